"""What distillation trains, before it is trained: one block for each run, and blocks with smaller modules."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl.common.files import read_tensors
from ppcl.student.assembly import RunKey, fill_width, run_name, start_block, substitute_block
from ppcl.student.plan import CompressionPlan, start_index
from ppcl.teacher.families import Adapter


def new_substitutes(
    transformer: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    fitted: Path | None,
    closed_forms: Path | None = None,
    home: torch.device | None = None,
) -> dict[RunKey, nn.Module]:
    """One trainable block for each run of the plan and each kept block with smaller modules.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        plan: Names the start of each substitute.
        fitted: ``candidates.safetensors`` of the fit stage, to go on from where it has the run.
        closed_forms: ``analysis.safetensors`` of the analyze stage, which smaller modules start from, with the fit
            stage's ``width.safetensors`` beside it; plans of depth alone need none.
        home: Where the substitutes wait; the teacher's device if None.
    """
    tensors = width_tensors(closed_forms) if plan.has_width and closed_forms else {}
    fitted_tensors = read_tensors(fitted)[0] if fitted is not None and fitted.is_file() else {}
    substitutes: dict[RunKey, nn.Module] = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        for segment in plan.stacks[spec.name]:
            if not segment.is_substitute:
                continue
            key = (spec.name, segment.first, segment.last)
            whole = start_block(blocks, segment.first, segment.last, segment.start or "middle").to(torch.float32)
            prefix = f"{run_name(key)}/"
            state = {name.removeprefix(prefix): t for name, t in fitted_tensors.items() if name.startswith(prefix)}
            if state:
                whole.load_state_dict(state)
            block = substitute_block(blocks, segment).to(torch.float32)
            shapes = {name: value.shape for name, value in block.state_dict().items()}
            block.load_state_dict(
                {n: t for n, t in whole.state_dict().items() if shapes.get(n) == t.shape}, strict=False
            )
            if segment.width:
                index = start_index(segment.first, segment.last, segment.start)
                fill_width(block, whole, spec, index, segment.width, tensors)
            substitutes[key] = block.to(home) if home else block
    return substitutes


def width_tensors(closed_forms: Path) -> dict[str, Tensor]:
    """Read what smaller modules start from: the analyze stage's file and the fit stage's beside it."""
    beside = closed_forms.with_name("width.safetensors")
    return read_tensors(closed_forms)[0] | (read_tensors(beside)[0] if beside.is_file() else {})
