"""The distill stage of a run: what is in memory while it trains, and whether that fits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from ppcl.capture.states import States
from ppcl.common.devices import weights_dtype
from ppcl.distill.fresh_states import fresh_states
from ppcl.distill.memory import check_memory, estimate_distill, free_bytes
from ppcl.distill.samples import sheet_for
from ppcl.distill.trainer import Distiller, check_plan
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.description import config_digest
from ppcl.teacher.families import adapter_for, fixed_tail
from ppcl.teacher.loading import check_complete, open_pipeline

if TYPE_CHECKING:
    from ppcl.run.stages import Run

logger = logging.getLogger(__name__)


def distill_run(run: Run) -> None:
    """Train a run's substitutes, with nothing of the pipeline in memory but its transformer.

    ``sample_every`` and ``fresh`` keep the text encoder and the VAE there, too: they draw and noise pictures.

    Raises:
        TrainingError: It would not fit into memory.
    """
    plan = run.read(CompressionPlan, "plan.json")
    settings = run.config.distill
    pipeline = run.teacher if settings.sample_every or settings.fresh else None  # which ask for VAE and text encoder
    transformer = take_transformer(run)
    check_plan(plan, config_digest(transformer), run.out / "plan.json")
    states = (fresh_states(run, pipeline) if pipeline else None) or States(run.out / "calibration", "train")
    say_memory(run, transformer, plan, states)
    Distiller(
        transformer,
        adapter_for(transformer),
        plan,
        run.out / "calibration",
        run.out,
        settings,
        run.config.seed,
        run.config.precision,
        run.log,
        group=run.group,
        device=run.device,
        sample=sheet_for(run, pipeline) if pipeline else None,
        states=states,
        keep_teacher=False,
    ).run()


def take_transformer(run: Run) -> Any:
    """The teacher's transformer alone; text encoders and VAE are let go, and later stages load the pipeline again.

    States were recorded with the prompts' embeddings, so training asks for neither.
    """
    loaded = vars(run).pop("teacher", None)
    settings = run.config.distill
    waits = settings.offload != "none" or settings.splits_teacher(run.group.size)  # until they are split
    if loaded is None:
        dtype = weights_dtype(run.device, run.config.precision)
        transformer = open_pipeline(run.model, run.device, dtype).transformer
        check_complete(run.model, transformer)
    else:
        transformer = loaded.transformer
    del loaded
    for name, part in transformer.named_children():
        blocks = name in {spec.name for spec in adapter_for(transformer).stacks}
        part.to("cpu" if blocks and waits else run.device)
        for block in fixed_tail(transformer, name) if blocks else ():
            block.to(run.device)  # which neither streams nor is split
    for parameter in transformer.parameters(recurse=False):
        parameter.data = parameter.data.to(run.device)
    for name, buffer in transformer.named_buffers(recurse=False):
        setattr(transformer, name, buffer.to(run.device))
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return transformer


def say_memory(run: Run, transformer: nn.Module, plan: CompressionPlan, states: States) -> None:
    """Print what each stage of training will take, and stop if it is more than there is.

    Raises:
        TrainingError: It would not fit into memory.
    """
    settings, device = run.config.distill, run.device
    size = -(-settings.batch_size // (settings.accumulate * run.group.size))
    lower = run.config.precision == "bf16" or (run.config.precision == "auto" and device.type == "cuda")
    arguments = states.largest(size)
    try:
        found = estimate_distill(
            *(transformer, adapter_for(transformer), plan, arguments, settings),
            precision="bf16" if lower else "fp32",
            processes=run.group.size,
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # sizes that depend on numbers
        logger.warning("the memory of training cannot be predicted for %s (%s)", type(transformer).__name__, error)
        return
    if run.group.is_main:
        lines = [f"  memory: {stage} stage of distillation, {estimate}" for stage, estimate in found.items()]
        if settings.splits_teacher(run.group.size):
            lines.append(f"  memory: the teacher's blocks are split over {run.group.size} processes")
        Console(stderr=True, highlight=False).print("\n".join(lines), soft_wrap=True)
    present = sum(p.numel() * p.element_size() for p in transformer.parameters() if p.device == device)
    if device.type in ("cpu", "cuda") and not settings.shard:
        free = free_bytes(device) // (run.group.local_size if device.type == "cpu" else 1)  # which they share
        check_memory(found, present, free)
