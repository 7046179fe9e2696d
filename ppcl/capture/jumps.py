"""Record the teacher's guided trajectories as jumps, from which a student learns to draw in few steps without guidance.

The teacher draws a prompt in many steps with guidance: an Euler sampler moves on straight lines, so its latents x(s)
are known at every noise level s. The same prompt and noise are then drawn in few steps without guidance, for no more
than the arguments of those few calls and their noise levels s_0 > s_1 > ... > s_n. One *jump* leads from x(s_i) to
x(s_i+1), and what the transformer has to answer for it is the mean velocity (x(s_i+1) - x(s_i)) / (s_i+1 - s_i) of
the guided trajectory: a student that does ends in the teacher's picture, and no second network is needed to teach it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.trajectories import recording, split_batches, write_calls
from ppcl.common.files import write_json
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, step_generator
from ppcl.config import CaptureConfig
from ppcl.config.few_steps import FewStepsConfig
from ppcl.errors import ModelError
from ppcl.teacher.block_map import SCALES
from ppcl.teacher.calls import Call
from ppcl.teacher.pipeline_call import call_pipeline, guidance_arguments, other_transformers, without_guidance

SAMPLER = "FlowMatchEulerDiscreteScheduler"
CALL = "call.json"  # beside the trajectories: what the student's pipeline is to be called with
# settings of the sampler with few steps: a noise level that the last step starts from would cost one of them
FEW_STEPS = {"shift_terminal": None}
_ALIKE = 0.01  # relative difference of what is the same but for the rounding of half precision


@dataclass(frozen=True)
class _Move:
    """One step of the sampler: noise levels before and after it, latents before it, the velocity that it went by."""

    before: float
    after: float
    latents: Tensor
    velocity: Tensor

    def at(self, level: float) -> Tensor:
        """Latents at a noise level on the way."""
        return self.latents + (level - self.before) * self.velocity

    def distance(self, level: float) -> float:
        """How far a noise level lies from the way; 0 on it."""
        low, high = sorted((self.before, self.after))
        return max(low - level, level - high, 0.0)


def check_sampler(pipeline: Any) -> None:
    """Refuse a pipeline whose sampler does not move on straight lines.

    Raises:
        ModelError: It has another sampler, or draws new noise in each step.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    stochastic = getattr(scheduler, "config", {}).get("stochastic_sampling")
    if type(scheduler).__name__ != SAMPLER or stochastic:
        got = f"{type(scheduler).__name__}{' with stochastic_sampling' if stochastic else ''}"
        raise ModelError(
            f"distill.few_steps: {type(pipeline).__name__} samples by {got}, expected {SAMPLER}; save the teacher with "
            "that sampler, or leave distill.few_steps out"
        )


def check_few_steps(pipeline: Any, prompts: Sequence[str], settings: CaptureConfig, few: FewStepsConfig) -> None:
    """Draw one prompt in few steps, to find what keeps a teacher from being learned from, before hours of work.

    Raises:
        ModelError: It draws with two transformers; also see :func:`record_jumps`.
    """
    if others := other_transformers(pipeline):
        raise ModelError(
            f"distill.few_steps: {type(pipeline).__name__} draws with {others[0]}, too, and one transformer alone "
            "cannot learn all steps; leave distill.few_steps out"
        )
    record_jumps(pipeline, prompts[:1], 0, 0, settings, few.model_copy(update={"teacher_steps": 1}))


def capture_jumps(
    pipeline: Any, prompts: Sequence[str], folder: Path, settings: CaptureConfig, few: FewStepsConfig, seed: int
) -> None:
    """Record trajectories into ``folder``, as :func:`ppcl.capture.trajectories.capture` does states; files there stay.

    Args:
        pipeline: The teacher.
        prompts: Taken in turn.
        folder: Receives ``train-0000.safetensors`` and so on, and ``call.json``.
        settings: Size, guidance, and how many prompts are drawn at once.
        few: How many steps and trajectories.
        seed: Fixes noise and split.

    Raises:
        ModelError: See :func:`record_jumps`.
    """
    check_sampler(pipeline)
    prompts = list(islice(cycle(dict.fromkeys(prompts)), few.num_trajectories))
    jobs = split_batches(pipeline, prompts, settings, seed)
    with Progress("trajectories", total=len(jobs)) as progress:
        for number, (name, batch) in enumerate(jobs):
            path = folder / f"{name}.safetensors"
            if not path.is_file():
                calls, jumps = record_jumps(pipeline, batch, seed, number * settings.batch_size, settings, few)
                write_calls(path, calls, prompts=batch, jumps=jumps)
            progress.advance()
    arguments = guidance_arguments(pipeline, without_guidance(pipeline, settings))
    scales = {name: float(arguments[name]) for name in SCALES if name in arguments}
    write_json(folder / CALL, {"num_inference_steps": few.num_inference_steps, **scales})


def record_jumps(
    pipeline: Any, prompts: Sequence[str], seed: int, first: int, settings: CaptureConfig, few: FewStepsConfig
) -> tuple[list[Call], list[float]]:
    """Draw prompts in many steps with guidance and in few without, from the same noise.

    Args:
        pipeline: The teacher.
        prompts: A batch.
        seed: Of the noise.
        first: Number of the batch's first trajectory, which its noise depends on, too.
        settings: Size and guidance.
        few: How many steps.

    Returns:
        The calls in few steps, in order, at latents of the guided trajectory and answered by its mean velocity; and how
        far each moves the latents for an answer of 1: the difference of noise levels, negative where a pipeline turns
        the answer's sign round.

    Raises:
        ModelError: The pipeline fails, has another sampler, hands its transformer more than the latents, steps by
            something else than the answer, or cannot be told to leave guidance out.
    """
    check_sampler(pipeline)

    def noise() -> list[torch.Generator]:
        return [step_generator(seed, first + i, Stream.FEW_STEPS_NOISE) for i in range(len(prompts))]

    def draw(steps: int, settings: CaptureConfig) -> None:
        arguments = guidance_arguments(pipeline, settings)
        call_pipeline(
            pipeline, prompts, generator=noise(), num_inference_steps=steps, output_type="latent", **arguments
        )

    with _moves(pipeline) as path:
        draw(few.teacher_steps or settings.num_inference_steps, settings)
    with _few_step_sampler(pipeline), _moves(pipeline) as moves, recording(pipeline.transformer) as calls:
        draw(few.num_inference_steps, without_guidance(pipeline, settings))
    name = latents_name(pipeline.transformer)
    sign = _sign(pipeline, calls, [stacked(call.arguments[name]) for call in calls], moves)
    levels = [*(move.before for move in moves), moves[-1].after]
    points = [min(path, key=lambda move: move.distance(level)).at(level) for level in levels]
    jumps = [sign * (after - before) for before, after in pairwise(levels)]
    taught = []
    for call, jump, (start, end) in zip(calls, jumps, pairwise(points), strict=True):
        arguments = {**call.arguments, name: in_place_of(call.arguments[name], start)}
        answer = ((end - start) / jump).reshape(call.velocity.shape).to(call.velocity.dtype)
        taught.append(Call(arguments, answer, per_sample=call.per_sample))
    return taught, jumps


def latents_name(transformer: nn.Module) -> str:
    """The argument that latents are handed to: the first one."""
    return next(iter(inspect.signature(transformer.forward).parameters))


def stacked(value: Tensor | list[Tensor]) -> Tensor:
    """The latents of a call, (B, ...), where they may be a list of one tensor a sample."""
    return torch.stack(value) if isinstance(value, list) else value


def in_place_of(value: Tensor | list[Tensor], latents: Tensor) -> Tensor | list[Tensor]:
    """Other latents, in the form, shape and dtype of those that were there."""
    like = stacked(value)
    latents = latents.reshape(like.shape).to(like.dtype)
    return list(latents) if isinstance(value, list) else latents


@contextlib.contextmanager
def _moves(pipeline: Any) -> Iterator[list[_Move]]:
    """Watch the steps of a pipeline's sampler inside the block."""
    scheduler, moves, step = pipeline.scheduler, list[_Move](), pipeline.scheduler.step
    parameters = inspect.signature(step)

    def watched(*args: Any, **kwargs: Any) -> Any:
        given, result = parameters.bind(*args, **kwargs).arguments, step(*args, **kwargs)
        before, after = (float(scheduler.sigmas[scheduler.step_index - back]) for back in (1, 0))
        latents, velocity = (given[name].detach().float().cpu() for name in ("sample", "model_output"))
        moves.append(_Move(before, after, latents.clone(), velocity.clone()))
        return result

    scheduler.step = watched
    try:
        yield moves
    finally:
        del scheduler.step


@contextlib.contextmanager
def _few_step_sampler(pipeline: Any) -> Iterator[None]:
    """Give a pipeline the sampler of few steps for a while."""
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **FEW_STEPS)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler


def _sign(pipeline: Any, calls: Sequence[Call], latents: Sequence[Tensor], moves: Sequence[_Move]) -> int:
    """Whether the sampler goes by the transformer's answers, 1, or by their opposite, -1; see :func:`record_jumps`."""
    name = type(pipeline).__name__
    if len(calls) != len(moves):
        why = f"asks its transformer {len(calls)} times in {len(moves)} steps where guidance is off"
    elif not all(_alike(given, move.latents) for given, move in zip(latents, moves, strict=True)):
        why = "hands its transformer something else than the sampler's latents alone"
    else:
        pairs = list(zip(calls, moves, strict=True))
        for sign in (1, -1):
            if all(_alike(sign * call.velocity, move.velocity) for call, move in pairs):
                return sign
        why = "samples by something else than its transformer's answer"
    raise ModelError(f"distill.few_steps: {name} {why}; leave distill.few_steps out for this teacher")


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever shape, but for rounding."""
    if one.numel() != other.numel():
        return False
    first, second = one.detach().float().cpu().flatten(), other.flatten()
    return bool((first - second).norm() <= _ALIKE * second.norm())
