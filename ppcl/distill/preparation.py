"""Before training: what of the teacher stays in memory, and whether training fits beside it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ppcl.capture.states import States
from ppcl.common.devices import weights_dtype
from ppcl.config import DistillConfig
from ppcl.distill.memory import check_memory, estimate_distill, free_bytes
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import adapter_for, fixed_tail
from ppcl.teacher.loading import check_complete, open_pipeline
from ppcl.training.distributed import Group

logger = logging.getLogger(__name__)


def training_transformer(
    pipeline: Any | None, model: str, device: torch.device, settings: DistillConfig, precision: str, processes: int
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
    """
    waits = settings.offload != "none" or settings.splits_teacher(processes)  # until they are split
    if pipeline is None:
        transformer = open_pipeline(model, device, weights_dtype(device, precision)).transformer
        check_complete(model, transformer)
    else:
        transformer = pipeline.transformer
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
    size = -(-settings.batch_size // (settings.accumulate * group.size))
    is_half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    arguments = states.largest(size)
    try:
        estimates = estimate_distill(
            *(transformer, adapter_for(transformer), plan, arguments, settings),
            precision="bf16" if is_half else "fp32",
            processes=group.size,
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # sizes that depend on numbers
        logger.warning("the memory of training cannot be predicted for %s (%s)", type(transformer).__name__, error)
        return
    if group.is_main:
        lines = [f"  memory: {stage} stage of distillation, {estimate}" for stage, estimate in estimates.items()]
        if settings.splits_teacher(group.size):
            lines.append(f"  memory: the teacher's blocks are split over {group.size} processes")
        Console(stderr=True, highlight=False).print("\n".join(lines), soft_wrap=True)
    present = sum(p.numel() * p.element_size() for p in transformer.parameters() if p.device == device)
    if device.type in ("cpu", "cuda") and not settings.shard:
        free = free_bytes(device) // (group.local_size if device.type == "cpu" else 1)  # which they share
        check_memory(estimates, present, free)
