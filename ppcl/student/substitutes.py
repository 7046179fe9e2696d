"""What distillation trains, before it is trained: one block for each run, and blocks with smaller modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl.common.tensor_files import StoredTensors
from ppcl.errors import ArtifactError
from ppcl.student.assembly import RunKey, fill_width, run_name, start_block, substitute_block
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.teacher.families import Adapter, StackSpec


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
    known = fitted_tensors(fitted)
    tensors = width_tensors(closed_forms) if plan.has_width and closed_forms else {}
    substitutes: dict[RunKey, nn.Module] = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        for segment in plan.stacks[spec.name]:
            if segment.is_substitute:
                block = new_substitute(blocks, spec, segment, known, tensors)
                substitutes[spec.name, segment.first, segment.last] = block.to(home) if home else block
    return substitutes


def new_substitute(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    spec: StackSpec,
    segment: Segment,
    fitted: Mapping[str, Tensor],
    closed_forms: Mapping[str, Tensor],
) -> nn.Module:
    """The trainable block of one segment, in float32.

    Args:
        blocks: The teacher's, of the segment's stack; each is asked for when it is needed, and not changed.
        spec: The stack.
        segment: Names its start and what is smaller in it.
        fitted: See :func:`fitted_tensors`.
        closed_forms: See :func:`width_tensors`; not asked for without smaller modules.
    """
    whole = start_block(blocks, segment.first, segment.last, segment.start or "middle").to(torch.float32)
    prefix = f"{run_name((spec.name, segment.first, segment.last))}/"
    state = {name.removeprefix(prefix): fitted[name] for name in fitted if name.startswith(prefix)}
    if state:
        if state.keys() != whole.state_dict().keys():
            raise ArtifactError(
                f"the fitted block {prefix[:-1]} has other weights than its run; run the fit stage again"
            )
        whole.load_state_dict(state)
    if not segment.width:
        return whole
    block = substitute_block(blocks, segment).to(torch.float32)
    shapes = {name: value.shape for name, value in block.state_dict().items()}
    block.load_state_dict({n: t for n, t in whole.state_dict().items() if shapes.get(n) == t.shape}, strict=False)
    index = start_index(segment.first, segment.last, segment.start)
    fill_width(block, whole, spec, index, segment.width, closed_forms)
    return block


def fitted_tensors(fitted: Path | None) -> Mapping[str, Tensor]:
    """What substitutes of runs go on from, by ``stack/first-last/name``: the fit stage's file, if there is one."""
    return StoredTensors(fitted) if fitted is not None else {}


def width_tensors(closed_forms: Path) -> Mapping[str, Tensor]:
    """What smaller modules start from: the analyze stage's file and the fit stage's beside it, read as asked for.

    Raises:
        ArtifactError: The analyze stage's file is not there.
    """
    if not closed_forms.is_file():
        raise ArtifactError(f"{closed_forms} does not exist; run the stage that writes it")
    return StoredTensors(closed_forms, closed_forms.with_name("width.safetensors"))
