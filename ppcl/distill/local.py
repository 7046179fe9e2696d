"""Non-sequential local distillation: each substitute learns from the teacher's own states.

The teacher runs once without gradients. Whenever a run of blocks ends, its substitute is
run on the state that entered the run, compared with the state that left it, and its
backward pass is done at once, so that one substitute's graph lives at a time. Blocks after
the last run are not executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.student.assembly import RunKey, start_block
from ppcl.teacher.calls import Call
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.families.masks import valid_tokens
from ppcl.teacher.trace import BlockCall, run_traced
from ppcl.training.distributed import WHOLE, Share, add_up
from ppcl.training.losses import state_loss


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
    done: Callable[[RunKey], None] | None = None,
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
        done: Called with each run when its gradients are there, so that they need not wait for the others.

    Returns:
        The loss of each run, weighed by the share.
    """
    losses = local_losses(transformer, adapter, arguments, substitutes, kind, backward, share, done)
    return {run: loss.item() for run, loss in losses.items()}


def local_losses(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    substitutes: Mapping[RunKey, nn.Module],
    kind: str = "normalized",
    backward: bool = True,
    share: Share = WHOLE,
    done: Callable[[RunKey], None] | None = None,
) -> dict[RunKey, Tensor]:
    """Do :func:`local_backward` without reading any number, so that a GPU need not wait; the losses are scalars."""
    entering: dict[tuple[str, int], BlockCall] = {}
    ending: dict[tuple[str, int], list[RunKey]] = {}
    for run in substitutes:
        ending.setdefault((run[0], run[2]), []).append(run)
    open_until = {(run[0], run[1]): max(r[2] for r in substitutes if r[:2] == run[:2]) for run in substitutes}
    losses: dict[RunKey, Tensor] = {}

    def visit(call: BlockCall) -> None:
        name = call.stack.name
        if (name, call.index) in open_until:
            entering[name, call.index] = replace(call, outputs={})  # what left its first block no run asks for
        for run in ending.get((name, call.index), ()):
            start = entering[name, run[1]]
            with torch.set_grad_enabled(backward):
                losses[run] = run_loss(adapter, start, call, substitutes[run], kind, share)
                if backward:
                    losses[run].backward()  # type: ignore[no-untyped-call]
            losses[run] = losses[run].detach()
            if done:
                done(run)
        for key in [k for k in entering if k[0] == name and open_until[k] <= call.index]:
            del entering[key]

    with torch.no_grad():
        run_traced(transformer, adapter, arguments, visit, stop_after=last_block(adapter, substitutes))
    return losses


def run_loss(
    adapter: Adapter, start: BlockCall, end: BlockCall, substitute: nn.Module, kind: str, share: Share = WHOLE
) -> Tensor:
    """Loss of one substitute on the state that enters its run, against the one that leaves it.

    Args:
        adapter: The family.
        start: The call of the run's first block; its outputs are not read.
        end: The call of the run's last block.
        substitute: A block.
        kind: State loss.
        share: What the batch counts, if it is a part of one.
    """
    output = adapter.call(end.stack, substitute, start.inputs, start.arguments)
    masks = valid_tokens(end.stack, end.arguments)
    return state_loss(output, end.outputs, masks, kind, weights_of(end.stack, share))


@torch.no_grad()
def best_starts(
    transformer: nn.Module,
    adapter: Adapter,
    sample: Sequence[tuple[Call, Share]],
    runs: Sequence[RunKey],
    starts: Sequence[str],
) -> dict[RunKey, str]:
    """The start of least state error for each run; of equals the first.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        sample: Held-out states, all batches of them, as :meth:`ppcl.capture.states.States.weighed` yields them.
        runs: Whose starts.
        starts: What there is to choose from.
    """
    losses: dict[str, dict[RunKey, float]] = {}
    blocks_of = {spec.name: adapter.blocks(transformer, spec) for spec in adapter.stacks}
    for start in starts:
        blocks = {run: start_block(blocks_of[run[0]], run[1], run[2], start) for run in runs}
        losses[start] = add_up(
            local_backward(transformer, adapter, call.arguments, blocks, backward=False, share=share)
            for call, share in sample
        )
    return {run: min(starts, key=lambda start: losses[start][run]) for run in runs}
