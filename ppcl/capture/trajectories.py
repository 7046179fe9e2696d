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

from ppcl.capture.prompts import cut_note, tokenizers_of
from ppcl.capture.spread import choose_rows
from ppcl.capture.states import guidance_branches
from ppcl.common.files import digest, read_json, write_json
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, captured_noise, step_generator
from ppcl.common.tensor_files import write_tensors
from ppcl.config import CaptureConfig
from ppcl.errors import ModelError, UserError
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call, _velocity_of
from ppcl.teacher.pipeline_call import (
    OFF,
    PicturedPrompt,
    call_pipeline,
    check_call,
    check_guidance,
    guidance_arguments,
    other_transformers,
    picture_arguments,
)

logger = logging.getLogger(__name__)
SPLITS = ("train", "held-out")


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
    pipeline: Any, prompts: Sequence[str], noise: Sequence[torch.Generator] | int, settings: CaptureConfig
) -> list[Call]:
    """Denoise a batch of prompts, each from its own noise; return every transformer call.

    Args:
        pipeline: The teacher.
        prompts: Of those that bring a picture, each is denoised alone.
        noise: A generator each, or a seed.
        settings: Size, steps and guidance.

    Raises:
        ModelError: The pipeline fails, or never calls the transformer.
    """
    noise = captured_noise(noise, 0, len(prompts)) if isinstance(noise, int) else noise
    batch = 1 if isinstance(prompts[0], PicturedPrompt) else len(prompts)
    with recording(getattr(pipeline, settings.component)) as calls:
        for start in range(0, len(prompts), batch):
            call_pipeline(
                pipeline,
                prompts[start : start + batch],
                generator=list(noise[start : start + batch]),
                num_inference_steps=settings.num_inference_steps,
                output_type="latent",
                **guidance_arguments(pipeline, settings),
            )
    if not calls:
        raise ModelError(
            f"{type(pipeline).__name__} draws in {settings.num_inference_steps} steps without its "
            f"{settings.component}; raise capture.num_inference_steps, or give a pipeline that uses it"
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
        ModelError: The teacher's answers are not finite.
    """
    if not all(torch.isfinite(call.velocity).all() for call in calls):
        raise ModelError("the teacher answers NaN or infinite numbers; run it in another format: --set precision=fp32")
    tensors: dict[str, Tensor] = {}
    nodes = [trees.flatten(call.arguments, f"{n:02d}", tensors) for n, call in enumerate(calls)]
    tensors |= {f"velocity.{n:02d}": call.velocity for n, call in enumerate(calls)}
    # A tensor that several calls share is stored once: a clone each would repeat the text.
    tensors, alias = trees.store_once(tensors)
    layout = {"rows": [call.whole_rows for call in calls], "per_sample": [sorted(call.per_sample) for call in calls]}
    write_tensors(path, tensors, {"calls": nodes, "alias": alias, **layout, **about})


def forget_others(folder: Path, samples: Sequence[Sequence[Any]]) -> None:
    """Remove the files of an attempt that found other samples: its split and its batches were other ones.

    Args:
        folder: Of states.
        samples: What tells each from the others.
    """
    marker, chosen = folder / "samples.json", {"digest": digest(samples), "samples": len(samples)}
    if marker.is_file() and read_json(marker) != chosen:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    write_json(marker, chosen)


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
    texts = list(dict.fromkeys(prompts))
    pictured = isinstance(texts[0], PicturedPrompt) if texts else False
    prompts = list(prompts if pictured else texts)[: settings.num_prompts]  # a text may go with several pictures
    if len(texts) < 2:
        raise UserError(f"calibration needs at least 2 different prompts, got {len(texts)}; add lines to --prompts")
    if note := cut_note(pipeline, texts):
        logger.warning("%s", note)
    if pictured:
        forget_others(folder, [[prompt.name, prompt] for prompt in prompts if isinstance(prompt, PicturedPrompt)])
    jobs = split_batches(pipeline, prompts, settings, seed)
    with Progress("capture", total=len(jobs)) as progress:
        for number, (name, batch) in enumerate(jobs):
            path = folder / f"{name}.safetensors"
            if not path.is_file():
                calls = record_calls(pipeline, batch, captured_noise(seed, number, len(batch)), settings)
                if number == 0:
                    _check_guided(pipeline, calls, len(batch), settings)
                sizes = [trees.batch_size(call.arguments) for call in calls]
                drawn = step_generator(seed, number, Stream.CAPTURED_STEPS)
                picked = choose_rows(len(calls), settings.states_per_prompt, min(sizes), drawn)
                branches = guidance_branches([call.arguments for call in calls])
                about = {"prompts": batch, "of": len(calls), "branches": [branches[i] for i in picked]}
                write_calls(path, [calls[i].take(chosen) for i, chosen in picked.items()], **about)
            progress.advance()


def split_batches(
    pipeline: Any, prompts: Sequence[str], settings: CaptureConfig, seed: int
) -> list[tuple[str, list[str]]]:
    """Batches of prompts that are drawn together, by the name of their file: ``train-0000`` and so on."""
    size = 1 if isinstance(prompts[0], PicturedPrompt) else settings.batch_size
    jobs = []
    for split, chosen in split_prompts(list(dict.fromkeys(prompts)), settings.held_out_share, seed).items():
        # Prompts of like length share a batch, so that few shapes of text embeddings arise.
        own = [prompt for prompt in prompts if prompt in set(chosen)]
        own.sort(key=lambda text: (prompt_length(pipeline, text), text))
        jobs += [(f"{split}-{i // size:04d}", own[i : i + size]) for i in range(0, len(own), size)]
    return jobs


def check_teacher(pipeline: Any, settings: CaptureConfig, pictured: bool, beside: bool = False) -> None:
    """Refuse a teacher that wants what it will not get, and say what of it stays as it is, or is left out.

    Args:
        pipeline: The teacher.
        settings: See :class:`CaptureConfig`.
        pictured: Whether its prompts bring pictures.
        beside: Whether its other transformer is compressed, too.

    Raises:
        ModelError: See :func:`ppcl.teacher.pipeline_call.check_call`.
    """
    check_call(pipeline, pictured)
    check_guidance(pipeline, settings)
    name = type(pipeline).__name__
    if (others := other_transformers(pipeline, settings.component)) and not beside:
        logger.warning(
            "%s has another transformer, %s; only %r is compressed, --component both takes the two",
            *(name, ", ".join(others), settings.component),
        )
    if not pictured and (pictures := picture_arguments(pipeline)):
        logger.warning(
            "%s also takes pictures (%s), and none of its calibration will have one: what it does with them is not "
            "looked after; set capture.data to captioned pictures (docs/data.md), or capture.sources=teacher",
            *(name, ", ".join(pictures)),
        )


def _check_guided(pipeline: Any, calls: Sequence[Call], count: int, settings: CaptureConfig) -> None:
    """Say so where the transformer's first calls are not what the guidance scale asks for."""
    double = trees.batch_size(calls[0].arguments) > count or max(guidance_branches([c.arguments for c in calls])) > 0
    asked = settings.guidance_scale
    if asked is not None and double != (asked > OFF) and not pipeline.transformer.config.get("guidance_embeds"):
        logger.warning(
            "%s asks its transformer %s a step at capture.guidance_scale=%g",
            *(type(pipeline).__name__, "twice" if double else "once", asked),
        )


def prompt_length(pipeline: Any, text: str) -> int:
    """Tokens of a prompt, or its characters where the pipeline has no single tokenizer."""
    tokenizer = tokenizers_of(pipeline).get("tokenizer")
    return len(tokenizer(str(text)).input_ids) if tokenizer else len(text)
