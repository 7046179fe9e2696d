"""Training inside a forward sweep: a substitute's turn comes when the sweep has the states at both ends of its run.

A substitute learns from the states that enter its run and those that leave it, and from nothing else. So whatever the
size of the model, one block of the teacher (two where they are streamed) and one substitute with its optimizer are in
memory. The level before each open run and the one at its end stay in the store until it is trained.

Several processes share the states of the sweep, and then train another run each, without a word to each other: as
many runs are collected as there are processes. Batches are drawn as ever, so the result is the one of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ppcl.analysis.entries import enter
from ppcl.analysis.sweep import Course, Seen, batches_of
from ppcl.capture.states import States as Recorded
from ppcl.capture.store import MEMORY, StateStore
from ppcl.common.files import digest
from ppcl.distill.local import run_loss
from ppcl.student.assembly import RunKey
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.calls import Call
from ppcl.teacher.families import StackSpec, States
from ppcl.teacher.trace import BlockCall
from ppcl.training.distributed import SINGLE, WHOLE, Group, Share
from ppcl.training.stopping import Stopped

R = TypeVar("R")


def training_course(
    source: Blocks,
    splits: Mapping[str, Recorded],
    size: int,
    folder: Path,
    fingerprint: str,
    limit: Mapping[str, int | None] | None = None,
    group: Group = SINGLE,
    precision: str = "fp32",
    memory: float = MEMORY,
) -> Course:
    """A sweep's batches and store such that any states can be put to a batch again.

    Args:
        source: The teacher's blocks.
        splits: The recorded states.
        size: Most states that go through a block together.
        folder: Receives what does not fit into memory; all processes must see it.
        fingerprint: Of the weights and all else that the states depend on, but the batches.
        limit: How many states of a split; all if it is not named.
        group: The processes that sweep; several keep all states on disk.
        precision: Autocast of the teacher.
        memory: Bytes of states that may be in memory.
    """
    batches = batches_of(splits, size, limit or {}, padded=False)
    memory = memory if group.size == 1 else 0  # all read what each wrote
    identity = digest(fingerprint, precision, [[batch.split, batch.rows] for batch in batches])
    return Course(source, batches, StateStore(folder, identity, memory, group), group, precision)


class Ends:
    """The states at a run's two ends, for any batch of what the sweep carries.

    Args:
        run: (stack, first, last).
        before: Holds the states that enter the run.
        after: Holds those that leave it; ``before`` if None.
        level: Where the states that enter are in ``before``; what leaves the block before the run if None.
    """

    def __init__(self, run: RunKey, before: Course, after: Course | None = None, level: int | None = None) -> None:
        self.run, self.before, self.after = run, before, after or before
        self.stack = before.source.stacks[run[0]]
        self.position = before.source.order.index(run[:2])
        self.level = self.position - 1 if level is None else level

    @property
    def levels(self) -> list[int]:
        """Levels of the store that are read: before the run, if anything is, and at its end."""
        return [level for level in (self.level, self.end) if level >= 0]

    @property
    def end(self) -> int:
        """Position of the run's last block."""
        return self.position + self.run[2] - self.run[1]

    @torch.no_grad()
    def calls(self, call: Call, split: str = "train") -> tuple[BlockCall, BlockCall]:
        """The calls of the run's first and last block on a batch, as :func:`ppcl.distill.local.run_loss` wants them.

        Args:
            call: States that the sweep carries, put together by :meth:`ppcl.capture.states.States.batch`.
            split: Where they are from.
        """
        course, (name, first, last) = self.before, self.run
        level = course.end_before(name)
        earlier = None if level is None else self._read(course, level, call, split)
        entry = enter(course.source, self.stack, call.arguments, earlier, course.precision, first)
        states = self._read(course, self.level, call, split) if first else entry.states
        named = {argument: self.stack.turn(states[stream]) for stream, argument in self.stack.inputs.items()}
        start = BlockCall(self.stack, first, {**entry.arguments[first], **named}, states, {})
        targets = self._read(self.after, self.end, call, split)
        return start, BlockCall(self.stack, last, start.arguments, {}, targets)

    def loss(
        self, block: nn.Module, call: Call, share: Share = WHOLE, kind: str = "normalized", split: str = "train"
    ) -> Tensor:
        """Loss of a substitute on a batch; see :func:`ppcl.distill.local.run_loss`."""
        start, end = self.calls(call, split)
        return run_loss(self.before.source.adapter, in_precision_of(block, start), end, block, kind, share)

    def _read(self, course: Course, level: int, call: Call, split: str) -> States:
        return course.rows(level, [course.places[split, row] for row in call.rows])


def in_precision_of(block: nn.Module, call: BlockCall) -> BlockCall:
    """What a teacher of half precision hands to a substitute, in the substitute's, where no autocast does that."""
    weight = next(block.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return call

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(weight.dtype) if tensor.is_floating_point() else tensor

    trees: tuple[dict[str, Any], States] = tree_map_only(Tensor, cast, (call.arguments, call.inputs))
    return replace(call, arguments=trees[0], inputs=trees[1])


class Trainees(Generic[R]):
    """A consumer of a forward sweep that trains substitutes.

    Args:
        course: The sweep; see :func:`training_course`.
        runs: What is still to be trained; runs may overlap.
        train: Trains a run's substitute in this process alone, and writes what the other processes need of it. It may
            be called again for a run after an interruption.
        collect: Called in all processes with what ``train`` returned in any of them, when runs are trained.

    Attributes:
        last: Position of the last block that any run needs; -1 without runs.
    """

    def __init__(
        self,
        course: Course,
        runs: Collection[RunKey],
        train: Callable[[RunKey, Ends], R],
        collect: Callable[[dict[RunKey, R]], None] | None = None,
    ) -> None:
        if course.group.size > 1 and course.store.memory:
            raise AssertionError("several processes read each other's states: they must be on disk")
        self.course, self.train, self.collect = course, train, collect
        self.open = {run: Ends(run, course) for run in runs}
        self.last = max((ends.end for ends in self.open.values()), default=-1)
        self.position = -1
        for ends in self.open.values():
            for level in ends.levels:
                course.store.hold(level)

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """A block at which no run ends is of no interest."""
        self.position = self.course.source.order.index((stack.name, index))
        return () if self._ready() else None

    def see(self, seen: Seen) -> None:
        """Nothing is looked at: all states are in the store."""

    def finish(self) -> None:
        """Train the runs whose ends are there, as many at a time as there are processes.

        Raises:
            Stopped: SIGTERM came to any of the processes while it trained; the others finish their runs first.
        """
        size, ready = self.course.group.size, self._ready()
        rest = 0 if len(ready) == len(self.open) and self.position >= self.last else len(ready) % size
        for at in range(0, len(ready) - rest, size):
            self._round(ready[at : at + size])

    def _ready(self) -> list[RunKey]:
        """Open runs that end here or before: a sweep that goes on after an interruption may be past some."""
        ready = [(ends.end, ends.position, run) for run, ends in self.open.items() if ends.end <= self.position]
        return [run for _, _, run in sorted(ready)]

    def _round(self, runs: Sequence[RunKey]) -> None:
        group = self.course.group
        group.barrier()  # the others have written their states of this block
        with torch.enable_grad():
            found = group.spread({run: self.open[run] for run in runs}, self._train)
        results = {run: result[0] for run, result in found.items() if result}
        if len(results) < len(runs):
            raise Stopped
        for run in runs:
            for level in self.open.pop(run).levels:
                self.course.store.release(level)
        if self.collect:
            self.collect(results)

    def _train(self, own: dict[RunKey, Ends]) -> dict[RunKey, tuple[R] | None]:
        """Train this process's runs; None where it was stopped, which the others are told before anybody leaves."""
        found: dict[RunKey, tuple[R] | None] = dict.fromkeys(own)
        try:
            for run, ends in own.items():
                found[run] = (self.train(run, ends),)
        except Stopped:
            if self.course.group.size == 1:
                raise
        return found
