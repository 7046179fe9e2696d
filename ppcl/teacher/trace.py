"""Watch a transformer's blocks while it runs: states in, states out, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppcl.common.hooks import removing
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec, States


@dataclass
class BlockCall:
    """One block's call.

    Attributes:
        stack: The block's stack.
        index: Its number in the stack, from 0.
        arguments: All named arguments of the call (states included).
        inputs: Stream states before it, (B, tokens, features).
        outputs: Stream states after it.
    """

    stack: StackSpec
    index: int
    arguments: dict[str, Any]
    inputs: States
    outputs: States


class _StopForward(Exception):
    """Ends a forward pass after the last block that matters."""


def run_traced(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    visit: Callable[[BlockCall], None],
    stop_after: tuple[str, int] | None = None,
) -> torch.Tensor | None:
    """Run the transformer on a batch of states and visit every block as it ends.

    Args:
        transformer: The teacher.
        adapter: Its family.
        arguments: A batch from :class:`ppcl.capture.states.States`.
        visit: Called once a block, in execution order, inside the forward pass.
        stop_after: (stack name, index) of the last block to run; later ones are not executed.

    Returns:
        The transformer's output, or None if it was stopped.
    """

    def watch(spec: StackSpec, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = adapter.bind(module, args, kwargs)
            inputs, outputs = adapter.input_states(spec, named), adapter.output_states(spec, output)
            visit(BlockCall(spec, index, named, inputs, outputs))
            if stop_after == (spec.name, index):
                raise _StopForward

        return hook

    handles = (
        block.register_forward_hook(watch(spec, index), with_kwargs=True)
        for spec in adapter.stacks
        for index, block in enumerate(adapter.blocks(transformer, spec))
    )
    devices = [parameter.device for parameter in transformer.parameters()]
    device = next((device for device in devices if device.type != "meta"), devices[0])  # a block's may be in files
    with removing(handles), suppress(_StopForward):
        return velocity(transformer, trees.to_device(arguments, device))
    return None


@torch.no_grad()
def record_boundaries(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    wanted: Collection[tuple[str, int]] | None = None,
    stop_after: tuple[str, int] | None = None,
) -> tuple[dict[tuple[str, int], BlockCall], torch.Tensor | None]:
    """Run the transformer once and keep the calls of the wanted blocks (all if None)."""
    calls: dict[tuple[str, int], BlockCall] = {}

    def visit(call: BlockCall) -> None:
        key = (call.stack.name, call.index)
        if wanted is None or key in wanted:
            calls[key] = call

    output = run_traced(transformer, adapter, arguments, visit, stop_after)
    return calls, output
