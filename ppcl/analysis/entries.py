"""What blocks are called with, from the transformer's own code, without running a block.

The transformer runs with stand-ins in its block lists. Those of a stack note what they are called with and let the
states through; one stands for the stack before, and returns the states that left it. So whatever a model does before,
between and behind its stacks, and whatever it gives to one of its blocks alone, is done by its own forward.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.devices import autocast
from ppcl.errors import ModelError
from ppcl.student.assembly import FixedStates, StandIn, with_blocks
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec, States

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """How a batch enters a stack.

    Attributes:
        states: Those that enter the first block, (B, tokens, features) each.
        arguments: All else that each block of the stack is called with, by name.
    """

    states: States
    arguments: tuple[Arguments, ...]


class _Arrived(Exception):
    """Ends a forward pass at the last block of a stack."""


class _Through(StandIn):
    """Stands for a block: returns the states as they came."""

    def __init__(self, adapter: Adapter, stack: StackSpec, block: nn.Module) -> None:
        super().__init__(block)
        self.adapter, self.stack = adapter, stack

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the states of the call."""
        named = self.adapter.bind(self.template[0], args, kwargs)
        return self.adapter.pack(self.stack, self.adapter.input_states(self.stack, named))


class _Recorder(_Through):
    """Notes its call besides; the last one ends the pass."""

    def __init__(
        self, adapter: Adapter, stack: StackSpec, block: nn.Module, calls: list[Arguments], last: bool
    ) -> None:
        super().__init__(adapter, stack, block)
        self.calls, self.last = calls, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call, and return its states."""
        self.calls.append(self.adapter.bind(self.template[0], args, kwargs))
        if self.last:
            raise _Arrived
        return super().forward(*args, **kwargs)


def enter(
    source: Blocks,
    stack: StackSpec,
    arguments: Arguments,
    before: States | None,
    precision: str,
    last: int | None = None,
) -> Entry:
    """Run a batch up to a stack.

    Args:
        source: The teacher's blocks; none is run.
        stack: The stack.
        arguments: What the transformer is called with.
        before: The states that left the stack before, on the source's device; None at the first stack. Where they
            need gradients, the states of the result are differentiable by them.
        precision: Autocast.
        last: Number of the last block whose arguments are wanted; all if None.

    Raises:
        ModelError: Something else that the blocks are called with depends on ``before``, in a differentiable pass.
    """
    transformer, adapter = source.transformer, source.adapter
    calls: list[Arguments] = []
    blocks = adapter.blocks(transformer, stack)
    lists = _stand_ins(source, stack.name, before)
    last = len(blocks) - 1 if last is None else last
    lists[stack.name] = [
        _Recorder(adapter, stack, block, calls, number == last) if number <= last else block
        for number, block in enumerate(blocks)
    ]
    try:
        with autocast(source.device, precision):
            velocity(with_blocks(transformer, lists), to_device(arguments, source.device))
    except _Arrived:
        pass
    carried = set(stack.inputs.values())
    others = tuple({name: value for name, value in named.items() if name not in carried} for named in calls)
    if before is not None and any(
        isinstance(v, Tensor) and v.requires_grad for named in others for v in named.values()
    ):
        raise ModelError(
            f"{type(transformer).__name__} calls the blocks of {stack.name} with arguments that depend on the states "
            "of the stack before; gradients cannot be carried through it block by block"
        )
    return Entry(adapter.input_states(stack, calls[0]), others)


def leave(source: Blocks, arguments: Arguments, states: States, precision: str) -> Tensor:
    """What the transformer answers on a batch, given the states that leave its last block, on the source's device."""
    lists = _stand_ins(source, None, states)
    with autocast(source.device, precision):
        return velocity(with_blocks(source.transformer, lists), to_device(arguments, source.device))


def _stand_ins(source: Blocks, stack: str | None, before: States | None) -> dict[str, list[nn.Module]]:
    """Stand-ins for all blocks, as many as there are: models count them. The stack before ``stack`` returns ``before``.

    ``stack`` is None at the end of the transformer.
    """
    adapter, previous = source.adapter, stack_before(source, stack)
    lists: dict[str, list[nn.Module]] = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(source.transformer, spec)
        if spec.name == previous and before is not None:
            lists[spec.name] = [FixedStates(adapter, spec, before, block) for block in blocks]
        else:
            lists[spec.name] = [_Through(adapter, spec, block) for block in blocks]
    return lists


def stack_before(source: Blocks, stack: str | None) -> str | None:
    """The stack that runs before another one (None: the end) and has blocks; None at the first."""
    names = list(dict.fromkeys(name for name, _ in source.order))
    position = len(names) if stack is None else names.index(stack)
    return names[position - 1] if position else None


class Entries:
    """What the blocks of one stack are called with, for every batch; kept while it fits, else asked for again.

    Equal tensors (rotary tables of pictures of one size) are kept once.

    Args:
        source: The teacher's blocks.
        stack: Their stack.
        precision: Autocast.
        limit: Bytes to keep at most.
    """

    def __init__(self, source: Blocks, stack: StackSpec, precision: str, limit: float) -> None:
        self.source, self.stack, self.precision, self.limit = source, stack, precision, limit
        self._kept: dict[int, tuple[Arguments, ...]] = {}
        self._pool: dict[tuple[Any, ...], Tensor] = {}
        self._bytes = 0

    def enter(self, number: int, arguments: Arguments, before: States | None) -> Entry:
        """How a batch enters the stack; see :func:`enter`."""
        entry = enter(self.source, self.stack, arguments, before, self.precision)
        if number not in self._kept and self._bytes < self.limit:
            seen: dict[int, Tensor] = {}  # blocks share their arguments
            self._kept[number] = tuple(self._pooled(named, seen) for named in entry.arguments)
        return entry

    def known(self, number: int, index: int) -> Arguments | None:
        """What a block is called with, if it was kept."""
        kept = self._kept.get(number)
        return None if kept is None else to_device(kept[index], self.source.device)

    def _pooled(self, tree: Any, seen: dict[int, Tensor]) -> Any:
        if isinstance(tree, dict):
            return {key: self._pooled(value, seen) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._pooled(value, seen) for value in tree)
        if not isinstance(tree, Tensor):
            return tree
        if id(tree) not in seen:
            content = tree.detach().cpu().contiguous()
            name = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
            key = (content.dtype, content.shape, name)
            if key not in self._pool:
                self._pool[key] = content
                self._bytes += content.numel() * content.element_size()
            seen[id(tree)] = self._pool[key]
        return seen[id(tree)]
