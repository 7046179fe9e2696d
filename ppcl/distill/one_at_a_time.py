"""The local stage one substitute at a time: what is in memory is one block and its optimizer, not all of them.

A substitute learns from the teacher's states at its run's two ends and from nothing else. So the teacher carries all
recorded states from one run to the next, once in all, and writes them to disk; each substitute is then trained on them
by itself, and states that no later run needs are removed. Batches are those of the joint stage, and so is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ppcl.capture.states import States as Recorded
from ppcl.common.devices import autocast
from ppcl.common.files import read_tensors, remove, write_tensors
from ppcl.distill.local import run_loss
from ppcl.errors import ArtifactError
from ppcl.student.assembly import FixedStates, RunKey, StandIn, run_name, with_blocks
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import Adapter, States
from ppcl.teacher.trace import BlockCall
from ppcl.training.distributed import SINGLE, Group, Share

Place = tuple[str, int]  # the states that leave this block


class _Arrived(Exception):
    """Carries the arguments of a block call out of a transformer."""


class _Entrance(StandIn):
    """Stands for a stack: hands over what its first block is called with."""

    def __init__(self, adapter: Adapter, block: nn.Module) -> None:
        super().__init__(block)
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """End the call."""
        raise _Arrived(self.adapter.bind(self.template[0], args, kwargs))


class Boundaries:
    """The teacher's states between blocks for all recorded states of a split, on disk.

    Args:
        folder: Receives a folder for each place where states are kept.
        recorded: The recorded states.
        transformer: The teacher's.
        adapter: Its family.
        precision: Autocast of the teacher.
        group: The processes that train; all see the folder, and each does its part of the work.
    """

    def __init__(
        self,
        folder: Path,
        recorded: Recorded,
        transformer: nn.Module,
        adapter: Adapter,
        precision: str = "auto",
        group: Group = SINGLE,
    ) -> None:
        self.folder, self.recorded, self.transformer, self.adapter = folder, recorded, transformer, adapter
        self.precision, self.group = precision, group
        self.order = [(s.name, i) for s in adapter.stacks for i in range(len(adapter.blocks(transformer, s)))]
        self.specs = {spec.name: spec for spec in adapter.stacks}
        outside = {id(p) for s in adapter.stacks for b in adapter.blocks(transformer, s) for p in b.parameters()}
        self.device = next(p for p in transformer.parameters() if id(p) not in outside).device

    def path(self, place: Place) -> Path:
        """Where the states that leave a block are."""
        return self.folder / f"{place[0]}-{place[1]}"

    def before(self, stack: str, index: int) -> Place | None:
        """The place whose states enter a block; None at the very beginning."""
        position = self.order.index((stack, index))
        return self.order[position - 1] if position else None

    @torch.no_grad()
    def entering(self, arguments: dict[str, Any], stack: str, index: int, states: States | None) -> BlockCall:
        """The call of a block, without running any block before it.

        Args:
            arguments: A batch of states.
            stack: The block's stack.
            index: Its number.
            states: The states at :meth:`before`, (B, tokens, features) each; None where that is None.
        """
        spec = self.specs[stack]
        lists: dict[str, list[nn.Module]] = {}
        previous = self.before(stack, 0)
        for other in self.adapter.stacks:
            blocks = self.adapter.blocks(self.transformer, other)
            lists[other.name] = [_Entrance(self.adapter, blocks[0])] if other is spec else []
            if states is not None and index == 0 and previous is not None and previous[0] == other.name:
                lists[other.name] = [FixedStates(self.adapter, other, states, blocks[0])]
        try:
            with autocast(self.device, self.precision):
                velocity(with_blocks(self.transformer, lists), to_device(arguments, self.device))
        except _Arrived as arrived:
            named: dict[str, Any] = arrived.args[0]
        inputs = states if states is not None and index else self.adapter.input_states(spec, named)
        return BlockCall(spec, index, named, inputs, {})

    def call(
        self, arguments: dict[str, Any], rows: Sequence[tuple[int, int]], run: RunKey
    ) -> tuple[BlockCall, BlockCall]:
        """The calls of a run's first and last block on a batch, from what :meth:`keep` stored.

        Args:
            arguments: The batch.
            rows: Where its samples were recorded.
            run: (stack, first, last).
        """
        stack, first, last = run
        place = self.before(stack, first)
        start = self.entering(arguments, stack, first, None if place is None else self.read(place, rows))
        return start, BlockCall(start.stack, last, start.arguments, {}, self.read((stack, last), rows))

    def keep(self, run: RunKey) -> None:
        """Have the states at both ends of a run on disk, and no others."""
        ends = [p for p in (self.before(run[0], run[1]), (run[0], run[2])) if p is not None]
        for place in ends:
            if not self.path(place).is_dir():
                self._carry(place)
        self.group.barrier()
        if self.group.is_main and self.folder.is_dir():
            for folder in self.folder.iterdir():
                if folder not in map(self.path, ends):
                    remove(folder)
        self.group.barrier()

    @torch.no_grad()
    def _carry(self, place: Place) -> None:
        """Carry all states from the nearest place before to this one."""
        position = self.order.index(place)
        known = [i for i in range(position) if self.path(self.order[i]).is_dir()]
        start = known[-1] if known else -1
        unfinished = self.path(place).with_name(f".{self.path(place).name}")
        for number in range(self.group.rank, len(self.recorded.calls), self.group.size):
            file = unfinished / f"{number}.safetensors"
            if file.is_file():
                continue  # an interrupted attempt wrote it
            arguments = self.recorded.calls[number].arguments
            states = None if start < 0 else self._whole(self.order[start], number)
            for stack, index in self.order[start + 1 : position + 1]:
                if states is None or index == 0 or (stack, index) == self.order[start + 1]:
                    call = self.entering(arguments, stack, index, states)
                block = self.adapter.blocks(self.transformer, self.specs[stack])[index]
                with autocast(self.device, self.precision):
                    states = self.adapter.call(
                        call.stack, block, states if states is not None and index else call.inputs, call.arguments
                    )
            write_tensors(file, {k: v.contiguous() for k, v in (states or {}).items()}, {})
        self.group.barrier()
        if self.group.is_main:
            unfinished.rename(self.path(place))
        self.group.barrier()

    def _whole(self, place: Place, number: int) -> States:
        with self._open(place, number) as file:
            return {name: file.get_tensor(name).to(self.device) for name in file.keys()}  # noqa: SIM118

    def read(self, place: Place, rows: Sequence[tuple[int, int]]) -> States:
        """The states of some samples at a place, on the teacher's device.

        Raises:
            ArtifactError: They are not there, or damaged.
        """
        parts: dict[str, list[Tensor]] = {}
        by_call: dict[int, list[int]] = {}
        for number, row in rows:
            by_call.setdefault(number, []).append(row)
        for number, picked in by_call.items():
            with self._open(place, number) as file:
                for name in file.keys():  # noqa: SIM118
                    view = file.get_slice(name)
                    parts.setdefault(name, []).extend(view[row : row + 1] for row in picked)
        return {name: torch.cat(found).to(self.device) for name, found in parts.items()}

    def _open(self, place: Place, number: int) -> Any:
        path = self.path(place) / f"{number}.safetensors"
        try:
            return safe_open(path, "pt")
        except Exception as error:  # safetensors raises errors of its own, and those of the system
            raise ArtifactError(f"{path} cannot be read ({error}); delete {self.folder} and run again") from None


def train_each(
    boundaries: Boundaries,
    substitutes: Mapping[RunKey, nn.Module],
    folder: Path,
    fingerprint: str,
    kind: str,
    train: Callable[[RunKey, Callable[[Call, Share], dict[str, float]]], None],
) -> None:
    """Train every substitute by itself; those that an earlier attempt finished are read.

    Args:
        boundaries: The teacher's states.
        substitutes: Blocks by run; only the one that trains is on the device.
        folder: Receives the weights of finished substitutes.
        fingerprint: Identifies the training; what another one finished is not read.
        kind: State loss.
        train: Trains a run's substitute, given what a part of a batch does.
    """
    order = [spec.name for spec in boundaries.adapter.stacks]
    group = boundaries.group
    for run in sorted(substitutes, key=lambda run: (order.index(run[0]), run[1])):
        block = substitutes[run]
        done = folder / f"{run_name(run).replace('/', '-')}.safetensors"
        home = next(block.parameters()).device
        finished, meta = read_tensors(done) if done.is_file() else ({}, None)
        if meta is not None and meta.get("fingerprint") == fingerprint:
            block.load_state_dict(finished)
            continue
        boundaries.keep(run)
        block.to(boundaries.device)

        def part(call: Call, share: Share, run: RunKey = run, block: nn.Module = block) -> dict[str, float]:
            start, end = boundaries.call(call.arguments, call.rows, run)
            loss = run_loss(boundaries.adapter, start, end, block, kind, share)
            loss.backward()  # type: ignore[no-untyped-call]
            return {"loss": loss.item(), f"loss/{run_name(run)}": loss.item()}

        train(run, part)
        block.to(home)
        state = block.state_dict()
        group.on_main(partial(write_tensors, done, state, {"fingerprint": fingerprint}))
    if group.is_main:
        remove(boundaries.folder)
