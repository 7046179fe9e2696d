"""Sums behind the closed forms of smaller modules, a few modules at a time.

The covariance of a feed-forward network's hidden features is the largest matrix here (12,288
squared in Qwen-Image), so that of all networks at once would not fit: modules are taken in
groups whose sums stay below a limit, with one teacher pass over the states for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.moments import Moments
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.trace import BlockCall, run_traced

LIMIT = 4e9  # bytes of sums at a time


@dataclass(frozen=True)
class Signal:
    """What is summed: the input x of a layer, or for the text a pair (Norm(h), x).

    Attributes:
        stack: Name of the block list.
        block: Number of the block in it.
        path: The layer inside the block.
        features: d of x.
        stream: Whose tokens x holds.
        norm: For the text: the LayerNorm between the stream's state h and x.
    """

    stack: str
    block: int
    path: str
    features: int
    stream: str
    norm: nn.LayerNorm | None = None

    @property
    def bytes(self) -> int:
        """Of its sums."""
        return 8 * self.features**2 * (1 if self.norm is None else 2)


def grouped(signals: Sequence[Signal], limit: float = LIMIT) -> list[list[Signal]]:
    """Split signals, in order, into groups of at most ``limit`` bytes or of one."""
    groups: list[list[Signal]] = []
    for signal in signals:
        if not groups or sum(s.bytes for s in groups[-1]) + signal.bytes > limit:
            groups.append([])
        groups[-1].append(signal)
    return groups


@torch.no_grad()
def moments_of(
    transformer: nn.Module,
    adapter: Adapter,
    signals: Sequence[Signal],
    batches: Sequence[dict[str, Any]],
    limit: float = LIMIT,
) -> Iterator[tuple[Signal, Moments]]:
    """Sum the signals over the states; padded tokens are left out.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        signals: What to sum.
        batches: Calibration states.
        limit: Bytes of sums held at a time.

    Yields:
        Each signal with its sums: of x alone (y has no features), or of x = Norm(h) and y = the layer's input.
    """
    for group in grouped(signals, limit):
        sums: dict[Signal, Moments] = {}
        for arguments in batches:
            _pass(transformer, adapter, group, sums, arguments)
        yield from sums.items()


def _pass(
    transformer: nn.Module,
    adapter: Adapter,
    group: Sequence[Signal],
    sums: dict[Signal, Moments],
    arguments: dict[str, Any],
) -> None:
    """One teacher pass that adds to the sums."""
    specs = {spec.name: spec for spec in adapter.stacks}
    order = list(specs)
    seen: dict[Signal, Tensor] = {}

    def watch(signal: Signal) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[signal] = args[0]

        return hook

    def visit(call: BlockCall) -> None:
        for signal in [s for s in seen if (s.stack, s.block) == (call.stack.name, call.index)]:
            _add(sums, signal, call, seen.pop(signal))

    handles = [
        adapter.blocks(transformer, specs[s.stack])[s.block].get_submodule(s.path).register_forward_pre_hook(watch(s))
        for s in group
    ]
    last = max(group, key=lambda s: (order.index(s.stack), s.block))
    try:
        run_traced(transformer, adapter, arguments, visit, stop_after=(last.stack, last.block))
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[Signal, Moments], signal: Signal, call: BlockCall, x: Tensor) -> None:
    x = _valid(call.stack, call, signal.stream, x)
    y = x[:, :0]
    if signal.norm is not None:
        x, y = _valid(call.stack, call, signal.stream, signal.norm(call.inputs[signal.stream])), x
    if signal not in sums:
        sums[signal] = Moments(x.shape[-1], y.shape[-1], x.device)
    sums[signal].update(x, y)


def _valid(spec: StackSpec, call: BlockCall, stream: str, x: Tensor) -> Tensor:
    """The rows of valid tokens, (N, features)."""
    mask = call.arguments.get(spec.masks.get(stream, ""))
    if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    return x.flatten(0, -2)
