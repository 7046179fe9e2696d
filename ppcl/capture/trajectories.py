"""Record the teacher's denoising states, and replay the transformer from them.

A *state* is one sample of one transformer call: latents, timestep, text embeddings and
every other argument. States come from the teacher's own trajectories, so that no picture
data is needed and the student is trained where the sampler goes (:mod:`ppcl.capture.pictures`
makes them from pictures). One file holds some calls of one batch of prompts; the files are
split into train and held-out by prompt.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.prompts import cut_note
from ppcl.capture.spread import choose_rows
from ppcl.capture.states import guidance_branches
from ppcl.common.files import write_tensors
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, captured_noise, step_generator
from ppcl.config import CaptureConfig
from ppcl.errors import UserError
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call, _velocity_of

logger = logging.getLogger(__name__)
SPLITS = ("train", "held-out")


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

    with transformer.register_forward_hook(record, with_kwargs=True):
        yield calls


def record_calls(
    pipeline: Any, prompts: Sequence[str], noise: Sequence[torch.Generator], settings: CaptureConfig
) -> list[Call]:
    """Denoise a batch of prompts, each from its own noise; return every transformer call."""
    with recording(pipeline.transformer) as calls:
        call_pipeline(
            pipeline,
            prompts,
            generator=list(noise),
            num_inference_steps=settings.num_inference_steps,
            output_type="latent",
            **guidance_arguments(pipeline, settings),
        )
    return calls


def write_calls(path: Path, calls: Sequence[Call], **about: Any) -> None:
    """Write calls as one file that :class:`ppcl.capture.states.States` reads.

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


def split_prompts(prompts: Sequence[str], share: float, seed: int) -> dict[str, list[str]]:
    """Shuffle prompts by seed and split them into train and held-out, neither of them empty."""
    order = torch.randperm(len(prompts), generator=step_generator(seed, 0, Stream.PROMPT_SPLIT)).tolist()
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
    if note := cut_note(pipeline, prompts):
        logger.warning("%s", note)
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
                calls = record_calls(pipeline, batch, captured_noise(seed, number, len(batch)), settings)
                sizes = [trees.batch_size(call.arguments) for call in calls]
                drawn = step_generator(seed, number, Stream.CAPTURED_STEPS)
                picked = choose_rows(len(calls), settings.states_per_prompt, min(sizes), drawn)
                branches = guidance_branches([call.arguments for call in calls])
                about = {"prompts": batch, "of": len(calls), "branches": [branches[i] for i in picked]}
                write_calls(path, [calls[i].take(chosen) for i, chosen in picked.items()], **about)
            progress.advance()


def prompt_length(pipeline: Any, text: str) -> int:
    """Tokens of a prompt, or its characters where the pipeline has no single tokenizer."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    return len(tokenizer(text).input_ids) if callable(tokenizer) else len(text)
