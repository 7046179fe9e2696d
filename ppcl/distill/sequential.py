"""Distillation in which substitutes see what the model before them really hands on.

``alternating_backward`` draws a coin for each substitute: heads, the teacher's blocks run; tails,
the substitute. The hybrid runs end to end and learns from the teacher's states and velocity. So
every substitute meets the errors of some of the others, and every combination of substitutes is
trained, which is what makes them pluggable. ``sequential_backward`` is an ablation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.distill.local import last_block, masks_of, weights_of
from ppcl.errors import UserError
from ppcl.student.assembly import RunKey, assemble_student
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec, States
from ppcl.teacher.trace import BlockCall, record_boundaries
from ppcl.training.distributed import WHOLE, Share
from ppcl.training.losses import state_loss, velocity_loss


def draw_active(keys: Collection[RunKey], generator: torch.Generator) -> list[RunKey]:
    """Draw each substitute with probability one half; all of them where none was drawn."""
    drawn = [key for key, coin in zip(keys, torch.rand(len(keys), generator=generator), strict=True) if coin < 0.5]
    return drawn or list(keys)


def alternating_backward(
    transformer: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    arguments: dict[str, Any],
    substitutes: Mapping[RunKey, nn.Module],
    active: Collection[RunKey],
    kind: str = "normalized",
    share: Share = WHOLE,
    checkpointing: bool = False,
) -> dict[str, float]:
    """One step of the hybrid in which the ``active`` substitutes are put in; leaves gradients in them.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        plan: The plan.
        arguments: A batch of states.
        substitutes: All substitutes of the plan.
        active: Those that are put in.
        kind: State loss.
        share: What the batch counts, if it is a part of one.
        checkpointing: Run blocks again in the backward pass instead of keeping what they computed.

    Returns:
        ``velocity`` and ``states`` (mean over the active substitutes), and their sum as ``loss``.
    """
    chosen = {key: substitutes[key] for key in active}
    targets, wanted = record_boundaries(transformer, adapter, arguments, {(key[0], key[2]) for key in chosen})
    if wanted is None:
        raise AssertionError("a full pass returns the velocity")
    hybrid = assemble_student(transformer, adapter, plan, substitutes, chosen)
    if checkpointing:
        checkpoint_blocks(hybrid)
    output, outputs = _run(hybrid, adapter, arguments, chosen)
    states = torch.stack(list(_state_losses(outputs, targets, kind, share).values())).mean()
    loss = share.samples * velocity_loss(output, wanted)
    (loss + states).backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.item() + states.item(), "velocity": loss.item(), "states": states.item()}


def checkpoint_blocks(student: Any) -> None:
    """Let a student's blocks run again in the backward pass (diffusers' own checkpointing); its teacher stays as it is.

    Raises:
        UserError: The class cannot do it.
    """
    try:
        student.enable_gradient_checkpointing()
    except (AttributeError, ValueError):
        raise UserError(
            f"distill.checkpointing: {type(student).__name__} has no gradient checkpointing; leave the setting out"
        ) from None


def sequential_backward(
    transformer: nn.Module,
    adapter: Adapter,
    student: nn.Module,
    arguments: dict[str, Any],
    substitutes: Mapping[RunKey, nn.Module],
    kind: str = "normalized",
    share: Share = WHOLE,
) -> dict[RunKey, float]:
    """The ablation: substitutes see the student's own states, and errors travel along.

    One backward pass through the whole chain; all graphs live at once.
    """
    wanted = {(run[0], run[2]) for run in substitutes}
    targets, _ = record_boundaries(transformer, adapter, arguments, wanted, last_block(adapter, substitutes))
    _, outputs = _run(student, adapter, arguments, substitutes)
    losses = _state_losses(outputs, targets, kind, share)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {run: loss.item() for run, loss in losses.items()}


def _run(
    student: nn.Module, adapter: Adapter, arguments: dict[str, Any], substitutes: Mapping[RunKey, nn.Module]
) -> tuple[Tensor, dict[RunKey, States]]:
    """Run a student; return its velocity and what its substitutes handed on."""
    outputs: dict[RunKey, States] = {}
    handles = []
    for run, block in substitutes.items():
        spec = next(s for s in adapter.stacks if s.name == run[0])

        def hook(_: nn.Module, args: Any, output: Any, run: RunKey = run, spec: StackSpec = spec) -> None:
            outputs[run] = adapter.output_states(spec, output)

        handles.append(block.register_forward_hook(hook))
    try:
        output = velocity(student, to_device(arguments, next(student.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return output, outputs


def _state_losses(
    outputs: Mapping[RunKey, States], targets: Mapping[tuple[str, int], BlockCall], kind: str, share: Share
) -> dict[RunKey, Tensor]:
    losses = {}
    for run, output in outputs.items():
        call = targets[run[0], run[2]]
        masks = masks_of(call.stack, call.arguments, call.outputs)
        losses[run] = state_loss(output, call.outputs, masks, kind, weights_of(call.stack, share))
    return losses
