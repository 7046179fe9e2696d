"""What drawing costs: transformer alone and whole pictures, several step counts and batch sizes, memory, FLOPs.

Two models are timed alternately, after a warm-up that does not count. Everything is measured on the
device that the pipelines are on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ppcl.config import EvaluateConfig
from ppcl.config.names import PICTURE_RUNS, TRANSFORMER, WARMUP
from ppcl.eval.generate import draw, picture_generator, quiet, steps_of
from ppcl.eval.results import Speed
from ppcl.eval.speed import measure_memory, measure_pair, weight_bytes
from ppcl.teacher.flops import count_flops
from ppcl.teacher.pipeline_call import PicturedPrompt

Call = Callable[[], object]
Part = Literal["transformer", "picture"]


@dataclass(frozen=True)
class Costs:
    """What drawing costs.

    Attributes:
        teacher: ``latency_ms`` of the transformer (with percentiles), ``latency_end_to_end_ms`` of one
            picture, its ``peak_memory_bytes``, and ``flops`` of a transformer call for one prompt.
        student: The same of the student.
        memory_measure: ``cuda`` or ``resident``.
        speed: The times at several step counts and batch sizes of the teacher and of the student, row by row
            the same work.
    """

    teacher: dict[str, float | None]
    student: dict[str, float | None]
    memory_measure: str
    speed: tuple[list[Speed], list[Speed]] = field(default_factory=lambda: ([], []))


def denoiser_of(pipeline: Any, component: str = TRANSFORMER) -> nn.Module | None:
    """The transformer (of several the one of that name) or U-Net of a pipeline, if it has one."""
    found = (getattr(pipeline, name, None) for name in (component, "unet"))
    return next((module for module in found if isinstance(module, nn.Module)), None)


def picture_call(pipeline: Any, prompts: Sequence[str], steps: int, kwargs: dict[str, Any], seed: int) -> Call:
    """A call that draws pictures from prompts to pixels, all at once, in so many steps or in those that it says."""
    steps, kwargs = steps_of(steps, kwargs)

    def call() -> object:
        generators = [picture_generator(seed, index) for index in range(len(prompts))]
        with quiet(pipeline):
            return draw(pipeline, prompts, generators, steps, kwargs)

    return call


class _Asked(Exception):
    """Ends a drawing at the first call of what is watched."""


def transformer_call(
    pipeline: Any, prompts: Sequence[str], steps: int, kwargs: dict[str, Any], seed: int, component: str = TRANSFORMER
) -> Call | None:
    """The transformer's (or U-Net's) first call of drawing these prompts at once, to be repeated; None without one."""
    module = denoiser_of(pipeline, component)
    if module is None:
        return None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep_first(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((args, named))
        raise _Asked

    watched = module.register_forward_pre_hook(keep_first, with_kwargs=True)
    with watched, torch.no_grad(), contextlib.suppress(_Asked):
        picture_call(pipeline, prompts, steps, kwargs, seed)()
    if not calls:
        return None
    args, named = calls[0]
    return lambda: module(*args, **named)


def _device(pipeline: Any) -> Any:
    return getattr(pipeline, "_execution_device", None) or getattr(pipeline, "device", None) or "cpu"


def peak_memory(pipeline: Any, call: Call, modules: Sequence[nn.Module] | None = None) -> tuple[int | None, str]:
    """Bytes that this pipeline alone takes: its weights on the device plus the growth while it works.

    The two pipelines are loaded together and may share parts, so a plain peak would hold both.

    Args:
        pipeline: Loaded on its device.
        call: What it does.
        modules: Whose weights count; all of the pipeline's if None.
    """
    device = _device(pipeline)
    parts = getattr(pipeline, "components", {}).values() if modules is None else modules
    weights = sum(weight_bytes(part, device) for part in parts if isinstance(part, nn.Module))
    memory = measure_memory(call, device)
    return (weights + memory.growth_bytes if memory.growth_bytes is not None else None), memory.measure


def batch_sizes(settings: EvaluateConfig, prompts: Sequence[str]) -> list[int]:
    """Batch sizes to time: those asked for, but none larger than what drawing uses, or than there are prompts."""
    most = 1 if isinstance(prompts[0], PicturedPrompt) else min(settings.batch_size, len(prompts))
    return sorted({min(size, most) for size in settings.speed_batch_sizes})


def step_counts(settings: EvaluateConfig, kwargs: tuple[dict[str, Any], dict[str, Any]]) -> list[tuple[int, int]]:
    """Steps of both models to time: those asked for, or all steps and half of them; of a model with its own the own."""
    steps = settings.num_inference_steps
    counts = sorted(set(settings.speed_steps or (max(1, steps // 2), steps)))
    one, two = (extra.get("num_inference_steps") for extra in kwargs)
    return [(one or count, two or count) for count in counts]


def flops_of(pipeline: Any, call: Call | None, component: str = TRANSFORMER) -> int | None:
    """FLOPs of a call of the transformer, as :func:`ppcl.teacher.flops.count_flops` counts; None without a call."""
    module = denoiser_of(pipeline, component)
    return int(count_flops(module, {}, call, 1)["total"]) if module is not None and call is not None else None


def _timed(
    pipelines: tuple[Any, Any],
    calls: tuple[Call, Call],
    size: int,
    runs: int,
    steps: tuple[int | None, int | None] = (None, None),
    component: str | None = None,
) -> tuple[Speed, Speed]:
    """Time the two models' calls alternately, and measure the memory of each: of a transformer, or of pictures."""
    latencies = measure_pair(*calls, runs=runs, warmup=WARMUP)
    part: Part = "transformer" if component else "picture"
    rows = []
    for pipeline, call, latency, count in zip(pipelines, calls, latencies, steps, strict=True):
        module = denoiser_of(pipeline, component) if component else None
        alone = None if module is None else [module]
        rows.append(
            Speed(
                part=part,
                batch_size=size,
                num_inference_steps=count,
                latency_ms=latency.median_ms,
                latency_p10_ms=latency.p10_ms,
                latency_p90_ms=latency.p90_ms,
                runs=runs,
                warmup_runs=WARMUP,
                peak_memory_bytes=peak_memory(pipeline, call, alone)[0],
            )
        )
    ratio = rows[0].latency_ms / rows[1].latency_ms if rows[1].latency_ms else None
    return rows[0], rows[1].model_copy(update={"times_as_fast": ratio})


def sweep(
    pipelines: tuple[Any, Any],
    prompts: Sequence[str],
    settings: EvaluateConfig,
    kwargs: tuple[dict[str, Any], dict[str, Any]],
    seed: int,
    component: str = TRANSFORMER,
) -> tuple[list[Speed], list[Speed]]:
    """Time both models at every batch size: one transformer call, and whole pictures at every step count.

    Returns:
        The rows of the first and of the second model, in the same order.
    """
    rows: list[tuple[Speed, Speed]] = []
    whole, both = settings.num_inference_steps, list(zip(pipelines, kwargs, strict=True))
    for size in batch_sizes(settings, prompts):
        some = list(prompts[:size])
        one, two = (transformer_call(p, some, whole, extra, seed, component) for p, extra in both)
        if one is not None and two is not None:
            rows.append(_timed(pipelines, (one, two), size, settings.latency_runs, component=component))
        for steps in step_counts(settings, kwargs):
            sides = zip(both, steps, strict=True)
            first, second = (picture_call(p, some, count, extra, seed) for (p, extra), count in sides)
            rows.append(_timed(pipelines, (first, second), size, min(PICTURE_RUNS, settings.latency_runs), steps))
    return [row[0] for row in rows], [row[1] for row in rows]


@torch.no_grad()
def costs(
    pipelines: tuple[Any, Any],
    prompts: Sequence[str],
    settings: EvaluateConfig,
    kwargs: tuple[dict[str, Any], dict[str, Any]],
    transformer_calls: tuple[Call, Call],
    seed: int,
    component: str = TRANSFORMER,
) -> Costs:
    """Time the two models alternately, and measure the memory of drawing one picture.

    Args:
        pipelines: The teacher's and the student's.
        prompts: What is drawn; the first of them, as many as a batch holds.
        settings: Runs, steps, batch sizes.
        kwargs: Arguments that the teacher's and the student's call take.
        transformer_calls: Run each transformer once; behind ``latency_ms``.
        seed: Of the noise.
        component: Which transformer.
    """
    prompt = list(prompts[:1])
    steps = settings.num_inference_steps
    transformer = measure_pair(*transformer_calls, runs=settings.latency_runs, warmup=WARMUP)
    speed = sweep(pipelines, prompts, settings, kwargs, seed, component)
    pictures = _one_picture(pipelines, prompt, settings, kwargs, seed, speed)
    rows: list[dict[str, float | None]] = []
    for index, pipeline in enumerate(pipelines):
        call = transformer_call(pipeline, prompt, steps, kwargs[index], seed, component)
        rows.append(
            {
                "latency_ms": transformer[index].median_ms,
                "latency_p10_ms": transformer[index].p10_ms,
                "latency_p90_ms": transformer[index].p90_ms,
                "latency_end_to_end_ms": pictures[index].latency_ms,
                "peak_memory_bytes": pictures[index].peak_memory_bytes,
                "flops": flops_of(pipeline, call, component),
            }
        )
    measure = "cuda" if torch.device(_device(pipelines[0])).type == "cuda" else "resident"
    return Costs(rows[0], rows[1], measure, speed)


def _one_picture(
    pipelines: tuple[Any, Any],
    prompt: list[str],
    settings: EvaluateConfig,
    kwargs: tuple[dict[str, Any], dict[str, Any]],
    seed: int,
    speed: tuple[list[Speed], list[Speed]],
) -> tuple[Speed, Speed]:
    """Times of drawing one prompt in all steps: those of the sweep, if it has them."""
    one, two = (int(extra.get("num_inference_steps") or settings.num_inference_steps) for extra in kwargs)
    for first, second in zip(*speed, strict=True):
        work = (first.part, first.batch_size, first.num_inference_steps, second.num_inference_steps)
        if work == ("picture", 1, one, two):
            return first, second
    draw_one, draw_two = (
        picture_call(pipeline, prompt, settings.num_inference_steps, extra, seed)
        for pipeline, extra in zip(pipelines, kwargs, strict=True)
    )
    runs = min(PICTURE_RUNS, settings.latency_runs)
    return _timed(pipelines, (draw_one, draw_two), 1, runs, (one, two))
