"""Record the teacher's denoising states, and replay the transformer from them.

A *state* is one sample of one transformer call: latents, timestep, text embeddings and
every other argument. States come from the teacher's own trajectories, so that no picture
data is needed and the student is trained where the sampler goes (:mod:`ppcl.picture_states`
makes them from pictures). One file holds some calls of one batch of prompts; the files are
split into train and held-out by prompt.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl import trees
from ppcl.config import CaptureConfig
from ppcl.errors import ArtifactError, UserError
from ppcl.files import read_tensors, write_tensors
from ppcl.progress import Progress
from ppcl.teacher import autocast, seeds
from ppcl.training.distributed import SINGLE, WHOLE, Group, Share
from ppcl.training.loop import step_generator

logger = logging.getLogger(__name__)
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class Call:
    """One call of the transformer.

    Attributes:
        arguments: By name.
        velocity: What the teacher answered, (B, ...).
        rows: Where each sample was recorded, (call, row), if it came from :class:`States`.
        per_sample: Which arguments have an entry for each sample, see :func:`ppcl.trees.per_sample`; found if empty.
        whole_rows: The row of each sample in the call that the pipeline made, which tells its prompt; all of them in
            order if empty.
    """

    arguments: dict[str, Any]
    velocity: Tensor
    rows: tuple[tuple[int, int], ...] = ()
    per_sample: frozenset[str] = frozenset()
    whole_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.per_sample:
            object.__setattr__(self, "per_sample", trees.per_sample(self.arguments))
        if not self.whole_rows:
            object.__setattr__(self, "whole_rows", tuple(range(trees.batch_size(self.arguments))))

    def take(self, chosen: Sequence[int]) -> Call:
        """The same call of some of its samples."""
        picked = trees.take(self.arguments, list(chosen), self.per_sample)
        rows = tuple(self.whole_rows[row] for row in chosen)
        return Call(picked, self.velocity[list(chosen)], per_sample=self.per_sample, whole_rows=rows)


def guidance_arguments(pipeline: Any, settings: CaptureConfig) -> dict[str, Any]:
    """Name the guidance and size arguments as this pipeline wants them (frames too, if it draws videos).

    Guidance-distilled transformers (``guidance_embeds``) take ``guidance_scale`` as an input;
    Qwen-like pipelines take ``true_cfg_scale`` with a negative prompt; the rest take
    ``guidance_scale`` with a negative prompt.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    distilled = bool(pipeline.transformer.config.get("guidance_embeds"))
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in ("height", "width", "num_frames")}
    if distilled or "true_cfg_scale" not in accepted:
        arguments["guidance_scale"] = settings.guidance_scale
    else:
        arguments["true_cfg_scale"] = settings.guidance_scale
    if not distilled and settings.guidance_scale > 1:
        arguments["negative_prompt"] = settings.negative_prompt
    return {name: value for name, value in arguments.items() if value is not None and name in accepted}


def call_pipeline(pipeline: Any, prompts: Sequence[str], **arguments: Any) -> Any:
    """Call a pipeline on a batch of prompts, repeating the negative prompt for each."""
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    return pipeline(prompt=list(prompts), **arguments)


@contextlib.contextmanager
def recording(transformer: nn.Module) -> Iterator[list[Call]]:
    """Record every call of a transformer inside the block, on the CPU."""
    calls: list[Call] = []
    parameters = inspect.signature(transformer.forward)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = dict(parameters.bind(*args, **kwargs).arguments)
        arguments.pop("return_dict", None)
        cpu = torch.device("cpu")
        calls.append(Call(trees.to_device(arguments, cpu), _velocity_of(output).to(cpu)))

    handle = transformer.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def record_calls(pipeline: Any, prompts: Sequence[str], seed: int, settings: CaptureConfig) -> list[Call]:
    """Denoise a batch of prompts; return every transformer call."""
    with recording(pipeline.transformer) as calls:
        call_pipeline(
            pipeline,
            prompts,
            generator=list(seeds(seed, len(prompts))),
            num_inference_steps=settings.num_inference_steps,
            output_type="latent",
            **guidance_arguments(pipeline, settings),
        )
    return calls


def write_calls(path: Path, calls: Sequence[Call], **about: Any) -> None:
    """Write calls as one file that :class:`States` reads.

    Args:
        path: The file.
        calls: In the order that they get.
        about: Recorded with them.

    Raises:
        UserError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    nodes = [trees.flatten(call.arguments, f"{n:02d}", tensors) for n, call in enumerate(calls)]
    tensors |= {f"velocity.{n:02d}": call.velocity for n, call in enumerate(calls)}
    # A tensor that several calls share is stored once: a clone each would repeat the text.
    tensors, alias = trees.store_once(tensors)
    layout = {"rows": [call.whole_rows for call in calls], "per_sample": [sorted(call.per_sample) for call in calls]}
    write_tensors(path, tensors, {"calls": nodes, "alias": alias, **layout, **about})


def choose_calls(num_calls: int, count: int, generator: torch.Generator) -> list[int]:
    """Draw ``count`` of ``num_calls`` calls, one from each equal stretch of the trajectory."""
    count = min(count, num_calls)
    edges = [i * num_calls // count for i in range(count + 1)]  # whole numbers, so that no call is drawn twice
    offsets = torch.rand(count, generator=generator).tolist()
    return [a + min(int((b - a) * o), b - a - 1) for a, b, o in zip(edges[:-1], edges[1:], offsets, strict=True)]


def choose_rows(num_calls: int, count: int, size: int, generator: torch.Generator) -> dict[int, list[int]]:
    """Draw ``count`` of ``num_calls`` calls for each of ``size`` samples, one from each equal stretch.

    Within a stretch every call gets as many samples as any other (one more or less), so that no timestep and neither
    branch of classifier-free guidance is left out by chance, as it is where a whole batch shares one draw. The same
    samples stay together from stretch to stretch: what they share, the text above all, is then stored once.

    Returns:
        The rows of each call that has any, in order.
    """
    count = min(count, num_calls)
    edges = [i * num_calls // count for i in range(count + 1)]  # whole numbers, so that no call is drawn twice
    order = torch.randperm(size, generator=generator).tolist()
    rows: dict[int, list[int]] = {}
    for first, end in itertools.pairwise(edges):
        for part, call in enumerate(torch.randperm(end - first, generator=generator).tolist()):
            if chosen := order[part :: end - first]:
                rows[first + call] = sorted(chosen)
    return dict(sorted(rows.items()))


def split_prompts(prompts: Sequence[str], share: float, seed: int) -> dict[str, list[str]]:
    """Shuffle prompts by seed and split them into train and held-out, neither of them empty."""
    order = torch.randperm(len(prompts), generator=step_generator(seed, 0, 17)).tolist()
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    shuffled = [prompts[i] for i in order]
    return {"held-out": shuffled[:count], "train": shuffled[count:]}


def capture(pipeline: Any, prompts: Sequence[str], folder: Path, settings: CaptureConfig, seed: int) -> None:
    """Record states of the prompts into ``folder``; files that are there are kept.

    Args:
        pipeline: The teacher.
        prompts: Calibration prompts, at least two.
        folder: Receives ``train-0000.safetensors``, ``held-out-0000.safetensors`` and so on.
        settings: See :class:`CaptureConfig`.
        seed: Fixes noise, split and choice of timesteps.

    Raises:
        UserError: There are fewer than two prompts.
    """
    prompts = list(dict.fromkeys(prompts))[: settings.num_prompts]
    if len(prompts) < 2:
        raise UserError(f"calibration needs at least 2 different prompts, got {len(prompts)}; add lines to --prompts")
    if isinstance(
        getattr(pipeline, "transformer_2", None), nn.Module
    ):  # Wan 2.2: one expert for much noise, one for little
        logger.warning("%s has two transformers; only 'transformer' is compressed", type(pipeline).__name__)
    jobs = []
    for split, chosen in split_prompts(prompts, settings.held_out_share, seed).items():
        # Prompts of like length share a batch, so that few shapes of text embeddings arise.
        chosen = sorted(chosen, key=lambda text: (prompt_length(pipeline, text), text))
        for start in range(0, len(chosen), settings.batch_size):
            jobs.append((split, start // settings.batch_size, chosen[start : start + settings.batch_size]))
    with Progress("capture", total=len(jobs)) as progress:
        for number, (split, index, batch) in enumerate(jobs):
            path = folder / f"{split}-{index:04d}.safetensors"
            if not path.is_file():
                calls = record_calls(pipeline, batch, seed * 7919 + number, settings)
                sizes = [trees.batch_size(call.arguments) for call in calls]
                drawn = step_generator(seed, number, 18)
                picked = choose_rows(len(calls), settings.states_per_prompt, min(sizes), drawn)
                write_calls(path, [calls[i].take(chosen) for i, chosen in picked.items()], prompts=batch, of=len(calls))
            progress.advance()


def prompt_length(pipeline: Any, text: str) -> int:
    """Tokens of a prompt, or its characters where the pipeline has no single tokenizer."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    return len(tokenizer(text).input_ids) if callable(tokenizer) else len(text)


class States:
    """The recorded states of one split.

    Args:
        folder: What :func:`capture` wrote.
        split: ``train`` or ``held-out``.

    Raises:
        ArtifactError: Nothing was recorded, or a file is damaged.
    """

    def __init__(self, folder: Path, split: str) -> None:
        paths = sorted(folder.glob(f"{split}-*.safetensors"))
        if not paths:
            raise ArtifactError(f"{folder} holds no {split} states; run ppcl capture first")
        self.calls: list[Call] = []
        groups: dict[str, list[tuple[int, int]]] = {}
        self.prompts: dict[tuple[int, int], str] = {}  # of each state: told apart, not read
        for path in paths:
            tensors, meta = read_tensors(path)
            if meta is None:
                raise ArtifactError(f"{path} was not written by ppcl capture; delete it and run again")
            tensors |= {name: tensors[twin] for name, twin in meta["alias"].items()}
            for number, node in enumerate(meta["calls"]):
                arguments, target = trees.unflatten(node, tensors), tensors.get(f"velocity.{number:02d}")
                if target is None:
                    raise ArtifactError(f"{path} was written by an older ppcl; delete {folder} and run again")
                rows, own = (meta[name][number] if name in meta else () for name in ("rows", "per_sample"))
                call = Call(arguments, target, per_sample=frozenset(own), whole_rows=tuple(rows))
                # guidance may double the samples of a call, and pictures may share a caption
                prompts = meta.get("prompts") or [f"{path.name} {row}" for row in call.whole_rows]
                members = groups.setdefault(trees.signature(arguments, call.per_sample), [])
                for place, row in enumerate(call.whole_rows):
                    members.append((len(self.calls), place))
                    self.prompts[len(self.calls), place] = prompts[row % len(prompts)]
                self.calls.append(call)
        self.groups = [groups[key] for key in sorted(groups)]

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def halves(self) -> tuple[States, States]:
        """Split the states into two sets of disjoint prompts.

        Raises:
            ArtifactError: They are of one prompt.
        """
        found = sorted(set(self.prompts.values()))
        if len(found) < 2:
            raise ArtifactError("the recorded states are of one prompt and cannot be split; capture.num_prompts is low")
        halves = copy.copy(self), copy.copy(self)
        for number, half in enumerate(halves):
            own = set(found[number::2])
            groups = ([row for row in group if self.prompts[row] in own] for group in self.groups)
            half.groups = [group for group in groups if group]
        return halves

    def _assemble(self, rows: Sequence[tuple[int, int]]) -> Call:
        by_call: dict[int, list[int]] = {}
        for call, row in rows:
            by_call.setdefault(call, []).append(row)
        parts = [self.calls[c].take(picked) for c, picked in by_call.items()]
        own = parts[0].per_sample
        joined: dict[str, Any] = trees.join([part.arguments for part in parts], own)
        places = tuple((c, row) for c, picked in by_call.items() for row in picked)
        return Call(joined, torch.cat([part.velocity for part in parts]), places, own)

    def largest(self, size: int) -> dict[str, Any]:
        """Arguments of a batch of at most ``size`` states, of the shapes that take the most room."""
        batches = (self._assemble(group[:size]).arguments for group in self.groups)
        return max(batches, key=lambda arguments: sum(t.numel() for t in arguments.values() if isinstance(t, Tensor)))

    def batches(self, size: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the arguments of :meth:`answered`."""
        return (call.arguments for call in self.answered(size, limit))

    def answered(self, size: int, limit: int | None = None) -> Iterator[Call]:
        """Yield all states once, in a fixed order, in batches of at most ``size``, with the teacher's answers.

        With ``limit``, about that many states, spread evenly over the set.
        """
        stride = max(1, len(self) // limit) if limit else 1
        left = limit if limit else len(self)
        for group in self.groups:
            rows = group[::stride][:left]
            left -= len(rows)
            for start in range(0, len(rows), size):
                yield self._assemble(rows[start : start + size])

    def draw(self, size: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw the places of a batch of states of one shape, groups in proportion to their size."""
        shares = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(shares, 1, generator=generator))]
        picks = torch.randint(len(group), (min(size, len(group)),), generator=generator).tolist()
        return [group[i] for i in sorted(picks)]

    def sample(self, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Draw the arguments of a batch of states of one shape."""
        return self._assemble(self.draw(size, generator)).arguments

    def parts(
        self, size: int, generator: torch.Generator, group: Group = SINGLE, accumulate: int = 1
    ) -> Iterator[tuple[Call, Share]]:
        """Draw the batch that :meth:`sample` would, and yield this process's parts of it, one after the other.

        Args:
            size: Samples of the whole batch, over all processes and parts.
            generator: The same in all processes.
            group: The processes that train.
            accumulate: Parts of each process.

        Returns:
            Parts with the teacher's answers, and what each counts. Every process gets as many parts; one without a
            sample (the batch is smaller than the number of parts) is the first sample with a share of 0.
        """
        return self.share_out(self.draw(size, generator), group, accumulate)

    def share_out(self, rows: Sequence[tuple[int, int]], group: Group, accumulate: int) -> Iterator[tuple[Call, Share]]:
        """Yield this process's parts of a batch whose places are drawn; see :meth:`parts`."""
        count = group.size * accumulate
        if count == 1:
            yield self._assemble(rows), WHOLE
            return
        valid = self._valid_tokens(rows)
        for index in range(group.rank * accumulate, (group.rank + 1) * accumulate):
            own = slice(index * len(rows) // count, (index + 1) * len(rows) // count)
            tokens = {name: sum(counts[own]) / max(1, sum(counts)) for name, counts in valid.items()}
            yield self._assemble(rows[own] or rows[:1]), Share(len(rows[own]) / len(rows), tokens)

    def _valid_tokens(self, rows: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
        """Valid tokens of each state, by the argument that marks them."""
        masks = {
            name
            for name, value in self.calls[rows[0][0]].arguments.items()
            if "mask" in name and isinstance(value, Tensor) and value.ndim == 2
        }
        return {name: [int(self.calls[call].arguments[name][row].bool().sum()) for call, row in rows] for name in masks}


def velocity(transformer: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Run the transformer on a batch of states; return its output (a list of tensors is stacked)."""
    return _velocity_of(transformer(**arguments, return_dict=False))


def _velocity_of(output: Any) -> Tensor:
    """The tensor in what a transformer returns: a tuple, an output class, or a list of one tensor a sample."""
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return torch.stack(output) if isinstance(output, list) else output


@torch.no_grad()
def velocity_error(
    teacher: nn.Module, student: nn.Module, batches: Iterator[dict[str, Any]], precision: str = "auto"
) -> float:
    """Relative velocity error sqrt(sum ||v_s - v_t||^2 / sum ||v_t||^2) over states; both run under autocast."""
    difference, total = 0.0, 0.0
    device = next(teacher.parameters()).device
    for arguments in batches:
        moved = trees.to_device(arguments, device)
        with autocast(device, precision):  # substitutes may be float32 where the teacher is not
            target, found = velocity(teacher, moved).double(), velocity(student, moved).double()
        difference += float((found - target).pow(2).sum())
        total += float(target.pow(2).sum())
    return math.sqrt(difference / total)
