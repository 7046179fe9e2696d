"""Non-sequential local distillation: each substitute learns from the teacher's own states.

The teacher runs once without gradients. Whenever a run of blocks ends, its substitute is
run on the state that entered the run, compared with the state that left it, and its
backward pass is done at once, so that one substitute's graph lives at a time. Blocks after
the last run are not executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.adapters import Adapter, StackSpec, States
from ppcl.distill.losses import state_loss
from ppcl.distributed import WHOLE, Share
from ppcl.student import RunKey
from ppcl.trace import BlockCall, run_traced


def masks_of(stack: StackSpec, arguments: Mapping[str, Any], states: States) -> dict[str, Tensor]:
    """Masks of valid tokens of a block call, for the streams that have one."""
    found = {stream: arguments.get(name) for stream, name in stack.masks.items()}
    return {s: m for s, m in found.items() if isinstance(m, Tensor) and m.shape == states[s].shape[:2]}


def weights_of(stack: StackSpec, share: Share) -> dict[str, float]:
    """What the mean token loss of each stream counts in that of the whole batch."""
    return {stream: share.of(stack.masks.get(stream)) for stream in stack.inputs}


def last_block(adapter: Adapter, runs: Mapping[RunKey, nn.Module]) -> tuple[str, int]:
    """The last block that any run needs."""
    order = [spec.name for spec in adapter.stacks]
    stack, _, last = max(runs, key=lambda run: (order.index(run[0]), run[2]))
    return stack, last


def local_backward(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    substitutes: Mapping[RunKey, nn.Module],
    kind: str = "normalized",
    backward: bool = True,
    share: Share = WHOLE,
) -> dict[RunKey, float]:
    """One local step on a batch of states; gradients are left in the substitutes.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        arguments: A batch of states.
        substitutes: Blocks by run; runs may overlap (candidates).
        kind: State loss.
        backward: False only measures.
        share: What the batch counts, if it is a part of one.

    Returns:
        The loss of each run, weighed by the share.
    """
    entering: dict[tuple[str, int], BlockCall] = {}
    ending: dict[tuple[str, int], list[RunKey]] = {}
    for run in substitutes:
        ending.setdefault((run[0], run[2]), []).append(run)
    open_until = {(run[0], run[1]): max(r[2] for r in substitutes if r[:2] == run[:2]) for run in substitutes}
    losses: dict[RunKey, float] = {}

    def visit(call: BlockCall) -> None:
        name = call.stack.name
        if (name, call.index) in open_until:
            entering[name, call.index] = call
        for run in ending.get((name, call.index), ()):
            start = entering[name, run[1]]
            with torch.set_grad_enabled(backward):
                output = adapter.call(call.stack, substitutes[run], start.inputs, start.arguments)
                masks = masks_of(call.stack, call.arguments, call.outputs)
                loss = state_loss(output, call.outputs, masks, kind, weights_of(call.stack, share))
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]
            losses[run] = loss.item()
        for key in [k for k in entering if k[0] == name and open_until[k] <= call.index]:
            del entering[key]

    with torch.no_grad():
        run_traced(transformer, adapter, arguments, visit, stop_after=last_block(adapter, substitutes))
    return losses
