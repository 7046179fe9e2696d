"""Before training: what of the teacher stays in memory, and whether training fits beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ppcl.capture.states import States
from ppcl.common.devices import weights_dtype
from ppcl.config import DistillConfig
from ppcl.config.names import TRANSFORMER
from ppcl.distill.memory import MemoryEstimate, check_memory, estimate_distill, estimate_streamed, free_bytes
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.families import adapter_for, fixed_tail
from ppcl.teacher.loading import check_complete, open_pipeline
from ppcl.training.distributed import Group

logger = logging.getLogger(__name__)


def training_transformer(
    pipeline: Any | None,
    model: str,
    device: torch.device,
    settings: DistillConfig,
    precision: str,
    processes: int,
    component: str = TRANSFORMER,
) -> Any:
    """The teacher's transformer alone, on its device; text encoders and VAE can leave memory.

    States were recorded with the prompts' embeddings, so training asks for neither.

    Args:
        pipeline: The teacher, if it is loaded.
        model: Where it is loaded from otherwise.
        device: Where training takes place.
        settings: What streams or is split waits on the CPU until then.
        precision: See ``RunConfig.precision``.
        processes: How many train.
        component: Which transformer.
    """
    waits = settings.offload != "none" or settings.splits_teacher(processes)  # until they are split
    if pipeline is None:
        transformer = getattr(open_pipeline(model, device, weights_dtype(device, precision)), component)
        check_complete(model, transformer)
    else:
        transformer = getattr(pipeline, component)
    stacks = {spec.name for spec in adapter_for(transformer).stacks}
    for name, part in transformer.named_children():
        is_stack = name in stacks
        part.to("cpu" if is_stack and waits else device)
        for block in fixed_tail(transformer, name) if is_stack else ():
            block.to(device)  # which neither streams nor is split
    for parameter in transformer.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in transformer.named_buffers(recurse=False):
        setattr(transformer, name, buffer.to(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return transformer


def say_memory(
    transformer: nn.Module,
    plan: CompressionPlan,
    states: States,
    settings: DistillConfig,
    precision: str,
    device: torch.device,
    group: Group,
) -> None:
    """Print what each stage of training will take, and stop if it is more than there is.

    Raises:
        TrainingError: It would not fit into memory.
    """
    parts = settings.accumulate * group.size

    def estimate(settings: DistillConfig, arguments: dict[str, Any], half: str) -> dict[str, MemoryEstimate]:
        common = (transformer, adapter_for(transformer), plan, arguments, settings)
        return estimate_distill(*common, precision=half, processes=group.size)

    if settings.splits_teacher(group.size) and group.is_main:
        _say([f"the teacher's blocks are split over {group.size} processes"])
    _say_and_check(estimate, transformer, states, settings, precision, device, group, parts)


def say_streamed_memory(
    source: Blocks, plan: CompressionPlan, states: States, settings: DistillConfig, precision: str, group: Group
) -> None:
    """Print what training takes where the teacher's blocks are streamed, and stop if it is more than there is.

    Raises:
        TrainingError: It would not fit into memory.
    """

    def estimate(settings: DistillConfig, arguments: dict[str, Any], half: str) -> dict[str, MemoryEstimate]:
        return estimate_streamed(source.transformer, source.adapter, plan, arguments, settings, half)

    # each process has whole batches of its own
    common = (source.transformer, states, settings, precision, source.device, group, settings.accumulate)
    _say_and_check(estimate, *common)


def _say(lines: Iterable[str]) -> None:
    text = "\n".join(f"  memory: {line}" for line in lines)
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)


def _say_and_check(
    estimate: Callable[[DistillConfig, dict[str, Any], str], dict[str, MemoryEstimate]],
    transformer: nn.Module,
    states: States,
    settings: DistillConfig,
    precision: str,
    device: torch.device,
    group: Group,
    parts: int,
) -> None:
    """Estimate with settings, arguments and precision of a step as it is run; see :func:`say_memory`."""
    # a part of several pieces is accumulated, too: gradients of the pieces before stay
    pieces = settings.accumulate * states.pieces(settings.batch_size, parts)
    as_run = settings.model_copy(update={"accumulate": pieces})
    is_half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    arguments = states.largest(settings.batch_size, parts)
    try:
        estimates = estimate(as_run, arguments, "bf16" if is_half else "fp32")
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # sizes that depend on numbers
        logger.warning("the memory of training cannot be predicted for %s (%s)", type(transformer).__name__, error)
        return
    if group.is_main:
        _say(f"{stage} stage of distillation, {sizes}" for stage, sizes in estimates.items())
    present = sum(p.numel() * p.element_size() for p in transformer.parameters() if p.device == device)
    if device.type in ("cpu", "cuda") and not settings.shard:
        free = free_bytes(device) // (group.local_size if device.type == "cpu" else 1)  # which they share
        check_memory(estimates, present, free)
