"""The forward sweep: all states go through the teacher block by block, instead of state by state.

    h_0 -> [T_1] -> h_1 -> [T_2] -> ... -> h_M -> velocity

One block is on the device, all batches go through it, then the next. Whoever wants to know something about a block (a
*consumer*) is served while it is there and is finished when it leaves. So memory holds one block (two where they are
streamed), one batch, and what the consumers need for one block, whatever the size of the model.

Level i of the store is what leaves block i, the i-th of all stacks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppcl.analysis.entries import Arguments, Entries, leave, stack_before
from ppcl.capture.states import Row
from ppcl.capture.states import States as Recorded
from ppcl.capture.store import StateStore
from ppcl.common.devices import autocast
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.calls import Call
from ppcl.teacher.families import StackSpec, States
from ppcl.teacher.trace import BlockCall
from ppcl.training.distributed import SINGLE, Group

ARGUMENTS = 2e9  # bytes of block arguments that are kept for a stack, instead of running what lies before it again


@dataclass(frozen=True)
class Batch:
    """Some of the recorded states.

    Attributes:
        number: Of this batch among all of the sweep.
        split: ``train`` or ``held-out``.
        first: Number of its first state in the split.
        load: Reads it.
        rows: Where its states were recorded, if they were.
    """

    number: int
    split: str
    first: int
    load: Callable[[], Call]
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer inside a block: its first argument, and what it returned."""

    input: Tensor
    output: Any


@dataclass(frozen=True)
class Seen:
    """A block's call on a batch, as a consumer sees it.

    Attributes:
        batch: The states.
        call: Arguments, states before and after.
        layers: The calls of the layers that the consumer asked for, by their paths.
        carried: What consumers left with this batch at the block before, in the same stack.
        gradients: In a backward sweep: d<r_k, velocity> / d(state after the block), (K, B, tokens, features) each.
    """

    batch: Batch
    call: BlockCall
    layers: Mapping[str, Sequence[LayerCall]]
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


class Consumer(Protocol):
    """Wants to know something about blocks, one at a time."""

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """A block is there.

        Returns:
            Paths of the layers inside it whose calls are to be seen; None: this block is of no interest.
        """

    def see(self, seen: Seen) -> Mapping[str, Tensor] | None:
        """The block was called on a batch (of this process).

        Returns:
            What is wanted again with this batch at the next block; it is stored with the states.
        """

    def finish(self) -> None:
        """All of this process's batches were seen, and the block is still there: solve, and write.

        A sweep that is killed right after this comes to the same block again.
        """


def batches_of(
    splits: Mapping[str, Recorded],
    size: int,
    limit: int | Mapping[str, int | None] | None = None,
    padded: bool = True,
) -> list[Batch]:
    """All batches of some splits, in a fixed order.

    Args:
        splits: The recorded states.
        size: Most states of a batch.
        limit: How many states, of each split or of all alike; see ``States.spread``.
        padded: Texts of several lengths go together where the model allows it. What is stored without padding can be
            put together anew (:meth:`Course.rows`).
    """
    batches: list[Batch] = []
    for split, states in splits.items():
        first, most = 0, limit.get(split) if isinstance(limit, Mapping) else limit
        for places in states.by_shape(states.spread(most), size, padded):
            batches.append(Batch(len(batches), split, first, lambda s=states, p=places: s.batch(p), places))  # type: ignore[misc]
            first += len(places)
    return batches


@dataclass(frozen=True)
class Course:
    """What all sweeps over the same states have in common.

    Attributes:
        source: The teacher's blocks.
        batches: The states; each process takes its share of them.
        store: Receives the states between blocks.
        group: The processes that sweep.
        precision: Autocast: ``bf16``, ``auto``, or ``fp32``: the weights' own.
        arguments: Bytes of block arguments to keep.
    """

    source: Blocks
    batches: Sequence[Batch]
    store: StateStore
    group: Group = SINGLE
    precision: str = "fp32"
    arguments: float = ARGUMENTS

    @property
    def own(self) -> Sequence[Batch]:
        """This process's batches."""
        return self.batches[self.group.rank :: self.group.size]

    @cached_property
    def places(self) -> dict[tuple[str, Row], tuple[int, int]]:
        """Where each state is: by split and place of recording, the number of its batch, and its own in there."""
        return {(b.split, row): (b.number, number) for b in self.batches for number, row in enumerate(b.rows)}

    def end_before(self, stack: str | None) -> int | None:
        """The level that leaves the stack before a stack (None: the end); None at the first."""
        previous = stack_before(self.source, stack)
        return None if previous is None else max(i for i, (name, _) in enumerate(self.source.order) if name == previous)

    def before(self, batch: Batch, stack: str | None) -> States | None:
        """The states that left the stack before a stack."""
        level = self.end_before(stack)
        return None if level is None else self.read(level, batch)

    def read(self, position: int, batch: Batch) -> States:
        """The states that leave a block."""
        stack = self.source.stacks[self.source.order[position][0]]
        states = self.store.read(position, batch.number, self.source.device, lambda name: name in stack.outputs)
        return {stream: stack.turn(state) for stream, state in states.items()}

    def rows(self, position: int, places: Sequence[tuple[int, int]]) -> States:
        """The states that leave a block, of some states of several batches; shorter texts get zeros at their end.

        Args:
            position: The block's.
            places: Number of the batch, and of the state in it.
        """
        stack = self.source.stacks[self.source.order[position][0]]
        by_batch: dict[int, list[int]] = {}
        for number, row in places:
            by_batch.setdefault(number, []).append(row)
        parts: dict[str, list[Tensor]] = {}
        axis = int(stack.tokens_first)
        for number, rows in by_batch.items():
            states = self.store.rows(position, number, rows, axis, lambda name: name in stack.outputs)
            for stream, state in states.items():
                parts.setdefault(stream, []).append(stack.turn(state))
        return {stream: torch.cat(_of_one_length(states)).to(self.source.device) for stream, states in parts.items()}

    def carried(self, position: int, batch: Batch) -> dict[str, Tensor]:
        """What consumers left with a batch at the block before, in the same stack."""
        if not self.source.order[position][1]:
            return {}
        names = self.source.stacks[self.source.order[position][0]].outputs
        return self.store.read(position - 1, batch.number, self.source.device, lambda name: name not in names)

    def write(self, position: int, batch: Batch, states: States, carried: Mapping[str, Tensor]) -> None:
        """Store the states that leave a block, laid out as the block does, so that the next one rounds alike."""
        stack = self.source.stacks[self.source.order[position][0]]
        turned = {stream: stack.turn(state) for stream, state in states.items()}
        self.store.write(position, batch.number, {**turned, **carried})

    def entries(self, position: int, present: Entries | None) -> Entries:
        """The entries of the stack of a block: the present ones, if they are of this stack."""
        stack = self.source.stacks[self.source.order[position][0]]
        if present is not None and present.stack is stack:
            return present
        return Entries(self.source, stack, self.precision, self.arguments)

    def inputs(self, entries: Entries, batch: Batch, position: int) -> tuple[States, Arguments]:
        """What the block at a position is called with: states, and all else."""
        stack, index = self.source.order[position]
        others = entries.known(batch.number, index)
        states = self.read(position - 1, batch) if index else None
        if states is None or others is None:
            entry = entries.enter(batch.number, batch.load().arguments, self.before(batch, stack))
            states, others = entry.states if states is None else states, entry.arguments[index]
        return states, others


def _of_one_length(states: Sequence[Tensor]) -> list[Tensor]:
    """Pad (B, tokens, features) to the most tokens; the mask of the batch they belong to leaves that out."""
    longest = max(state.shape[1] for state in states)
    return [nn.functional.pad(state, (0, 0, 0, longest - state.shape[1])) for state in states]


@torch.no_grad()
def forward_sweep(course: Course, consumers: Sequence[Consumer], last: int | None = None) -> None:
    """Carry all states through all blocks, and serve the consumers.

    An interrupted sweep with the same store goes on at the block where it was. The states that leave the last block
    stay in the store; so does every level that the caller holds.

    Args:
        course: Blocks, states, and where they are kept.
        consumers: Whoever wants to know something.
        last: Position of the last block that is run; all are if None.
    """
    source, store = course.source, course.store
    places = source.order if last is None else source.order[: last + 1]
    ends = [course.end_before(name) for name in dict(source.order)]
    for level in ends:  # a later stack is entered from there, by a sweep that goes on in its middle, too
        if level is not None:
            store.hold(level)
    done = store.resume([batch.number for batch in course.own])
    start = 0 if done is None else done + 1
    entries: Entries | None = None
    with closing(source.walk(places[start:])) as blocks:
        for position, block in enumerate(blocks, start):
            entries = course.entries(position, entries)
            visit = Visit(course, position, block, consumers)
            for batch in course.own:
                states, others = course.inputs(entries, batch, position)
                course.write(position, batch, *visit.run(batch, states, others, course.carried(position, batch)))
            visit.finish()
            store.commit(position)
    for level in ends:
        if level is not None:
            store.release(level)


class Visit:
    """A block's time on the device: it is run on batches, and the consumers that want it see its calls.

    Args:
        course: The sweep's.
        position: Of the block among all.
        block: The block.
        consumers: All consumers; those that want this block are told that it is there.
    """

    def __init__(self, course: Course, position: int, block: nn.Module, consumers: Sequence[Consumer]) -> None:
        self.course, self.position, self.block = course, position, block
        place = course.source.order[position]
        self.stack, self.index = course.source.spec(place), place[1]
        self.wanted: list[tuple[Consumer, Sequence[str]]] = []
        for consumer in consumers:
            paths = consumer.begin(self.stack, self.index, block)
            if paths is not None:
                self.wanted.append((consumer, paths))

    def run(
        self,
        batch: Batch,
        states: States,
        others: Arguments,
        carried: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None = None,
    ) -> tuple[States, dict[str, Tensor]]:
        """Run the block on a batch and show it to the consumers.

        Returns:
            The states after it, and what the consumers want again at the next block.
        """
        source, spec = self.course.source, self.stack
        layers: dict[str, list[LayerCall]] = {path: [] for _, paths in self.wanted for path in paths}
        handles = [self._watch(path, calls) for path, calls in layers.items()]
        try:
            with autocast(source.device, self.course.precision):
                outputs = source.adapter.call(spec, self.block, states, others)
        finally:
            for handle in handles:
                handle.remove()
        named = {name: spec.turn(states[stream]) for stream, name in spec.inputs.items()}
        call = BlockCall(spec, self.index, {**others, **named}, states, outputs)
        left: dict[str, Tensor] = {}
        with torch.no_grad():
            for consumer, paths in self.wanted:
                seen = Seen(batch, call, {path: layers[path] for path in paths}, carried, gradients or {})
                left |= consumer.see(seen) or {}
        return outputs, left

    def finish(self) -> None:
        """Tell the consumers that the block leaves."""
        for consumer, _ in self.wanted:
            consumer.finish()

    def _watch(self, path: str, calls: list[LayerCall]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(LayerCall(args[0] if args else next(iter(kwargs.values())), output))

        return self.block.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


@torch.no_grad()
def velocities(course: Course) -> Iterator[tuple[Batch, Tensor]]:
    """What the teacher answers on this process's batches, after a forward sweep."""
    for batch in course.own:
        states = course.before(batch, None)
        if states is None:
            raise AssertionError("a transformer without blocks has no sweep")
        yield batch, leave(course.source, batch.load().arguments, states, course.precision)
