"""The recorded states of one split: read, chosen from, and put together to batches."""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ppcl.capture.spread import Mark, allot, choose_states
from ppcl.common.artifacts import Count
from ppcl.common.files import read_json
from ppcl.common.progress import announce
from ppcl.common.tables import counted
from ppcl.common.tensor_files import finite, read_tensor_header, read_tensors
from ppcl.errors import ArtifactError, UserError, shortened
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call
from ppcl.training.distributed import SINGLE, WHOLE, Group, Share

Row = tuple[int, int]  # of a state: its call, and its place there
PADDING = "padding.json"  # beside the states, where :func:`ppcl.capture.padding.check_padding` looked at them
MOST_PADDED = 2  # a text is padded to at most so many times the shortest text beside it


def guidance_branches(calls: Sequence[dict[str, Any]]) -> list[int]:
    """The branch of guidance of each call, where branches are calls of their own: its number among those of a timestep.

    Args:
        calls: Arguments in the order of the calls.
    """
    branches: list[int] = []
    for number, arguments in enumerate(calls):
        times = [set(trees.timesteps(other)) for other in (arguments, *calls[max(0, number - 1) : number])]
        same = number > 0 and times[0] == times[1] and not _moved_on(calls[number - 1], arguments)
        branches.append(branches[-1] + 1 if same else 0)
    return branches


def _moved_on(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether latents, which a transformer takes first, differ: a sampler of two calls a step (Heun) went on."""
    stored: tuple[dict[str, Any], ...] = ({}, {})
    for arguments, tensors in zip((before, after), stored, strict=True):
        name = next(iter(arguments))
        trees.flatten({name: arguments[name]}, "", tensors)
    one, two = stored
    same_shapes = {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    return same_shapes and not all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of recorded states: that of the model that they were recorded from, half precision if any of it is.

    Args:
        folder: What capture writes; it may be empty, or not there.
    """
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    kinds = {entry["dtype"] for entry in read_tensor_header(path).values()} if path else set()
    by_kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return next((dtype for kind, dtype in by_kind.items() if kind in kinds), None)


class States:
    """The recorded states of one split.

    States of one shape (texts of equal length, above all) go through a model together. So do texts of other lengths,
    padded to the longest of the batch, where the model heeds its mask for them; no text is beside one of more than
    ``MOST_PADDED`` times its length. A batch of what cannot go together comes in pieces, each with its share in the
    means over the whole batch.

    Args:
        folder: What :func:`ppcl.capture.trajectories.capture` wrote.
        split: ``train`` or ``held-out``.
        text_mask: The argument that hides the padding of texts; as :func:`ppcl.capture.padding.check_padding` wrote
            it down, if empty.

    Attributes:
        calls: As they were recorded.
        groups: The states of each shape; shapes that go together stand side by side.
        marks: What tells each state from the others.
        jumps: Of calls that are steps of few: how far each moves the latents (:mod:`ppcl.capture.jumps`).

    Raises:
        ArtifactError: Nothing was recorded, or a file is damaged.
    """

    def __init__(self, folder: Path, split: str, text_mask: str = "") -> None:
        paths = sorted(folder.glob(f"{split}-*.safetensors"))
        if not paths:
            raise ArtifactError(f"{folder} holds no {split} states; run ppcl capture first")
        self.split, self.calls, self.jumps = split, list[Call](), list[float]()
        self.text_mask = text_mask or _recorded_mask(folder / PADDING)
        groups: dict[str, list[Row]] = {}
        fits: dict[str, tuple[str, int]] = {}  # of each shape: what else must be equal to go together, length of text
        told: dict[Row, tuple[float, Hashable, str]] = {}
        for path in paths:
            calls, recorded = _read_calls(path)
            self.jumps += recorded.jumps
            branches = recorded.branches or guidance_branches([call.arguments for call in calls])
            for call, branch in zip(calls, branches, strict=True):
                # guidance may double the samples of a call, and pictures may share a caption
                prompts = recorded.prompts or [f"{path.name} {row}" for row in call.whole_rows]
                shape = trees.signature(call.arguments, call.per_sample)
                fits[shape] = trees.without_length(call.arguments, call.per_sample, self.text_mask)
                members = groups.setdefault(shape, [])
                times = trees.timesteps(call.arguments)
                for place, (whole_row, time) in enumerate(zip(call.whole_rows, times, strict=True)):
                    members.append((len(self.calls), place))
                    double, number = divmod(whole_row, len(prompts))
                    told[members[-1]] = time, (branch, double), prompts[number]
                self.calls.append(call)
        shapes = sorted(groups, key=lambda shape: (*fits[shape], shape))
        self.groups = [groups[shape] for shape in shapes]
        self._first_of = _first_shapes([fits[shape] for shape in shapes])
        self.marks: dict[Row, Mark] = {}
        for number, group in enumerate(self.groups):
            size = trees.numbers(self.batch(group[:1]).arguments)
            for row in group:
                time, both, prompt = told[row]
                self.marks[row] = Mark(time, both, number, size, prompt)
        self._said: set[int] = set()

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def halves(self) -> tuple[States, States]:
        """Split the states into two sets of disjoint prompts.

        Raises:
            ArtifactError: They are of one prompt.
        """
        found = sorted({mark.prompt for mark in self.marks.values()})
        if len(found) < 2:
            raise ArtifactError("the recorded states are of one prompt and cannot be split; capture.num_prompts is low")
        first, second = ({row for row, mark in self.marks.items() if mark.prompt in found[n::2]} for n in (0, 1))
        return self.only(first), self.only(second)

    def only(self, rows: Collection[Row]) -> States:
        """The same states without all others."""
        part = copy.copy(self)
        groups = ([row for row in group if row in rows] for group in self.groups)
        part.groups = [group for group in groups if group]
        return part

    def batch(self, rows: Sequence[Row]) -> Call:
        """Put states that go together to one call."""
        by_call: dict[int, list[int]] = {}
        for call, row in rows:
            by_call.setdefault(call, []).append(row)
        parts = [self.calls[c].take(picked) for c, picked in by_call.items()]
        arguments = trees.pad([part.arguments for part in parts], self.text_mask)
        has_mask = isinstance(arguments[0].get(self.text_mask), torch.Tensor)
        per_sample = parts[0].per_sample | ({self.text_mask} if has_mask else set())
        joined: dict[str, Any] = trees.join(arguments, per_sample)
        places = tuple((c, row) for c, picked in by_call.items() for row in picked)
        return Call(joined, torch.cat([part.velocity for part in parts]), places, per_sample)

    def alike(self, size: int) -> dict[str, Any]:
        """Arguments of ``size`` states of the commonest shape, for what looks at shapes alone, speed for one."""
        group = max(self.groups, key=len)
        return self.batch([group[i % len(group)] for i in range(size)]).arguments

    def largest(self, size: int, parts: int = 1) -> dict[str, Any]:
        """Arguments of the piece of a batch that takes the most room; see :meth:`parts`.

        Args:
            size: Samples of the whole batch.
            parts: Of all processes.
        """
        size = min(size, len(self))
        return self._roomiest([min(-(-size * len(g) // len(self)), -(-size // parts)) for g in self.together()])

    def pieces(self, size: int, parts: int = 1) -> int:
        """The most pieces that one part of a batch can be of; see :meth:`largest`."""
        return min(len(self.together()), -(-min(size, len(self)) // parts))

    def together(self) -> list[list[Row]]:
        """The states that go through a model together, the shortest texts first."""
        return self.by_shape([row for group in self.groups for row in group], len(self))

    def _roomiest(self, counts: Sequence[int]) -> dict[str, Any]:
        """Of batches with so many states of each of :meth:`together`, the one with the most numbers."""
        batches = (
            self.batch([rows[(i - 1) % len(rows)] for i in range(count)]).arguments  # the longest text comes first
            for rows, count in zip(self.together(), counts, strict=True)
        )
        return max(batches, key=trees.numbers)

    def spread(self, limit: int | None = None) -> list[Row]:
        """Choose which states a limited sample has, and say how many; the only place that does.

        Args:
            limit: How many are wanted; all if None.

        Returns:
            ``limit`` states, or all where there are fewer, by :func:`ppcl.capture.spread.choose_states`: every
            timestep, branch of guidance, shape and prompt has its share. Shape by shape, in the order of recording.
        """
        rows = [row for group in self.groups for row in group]
        if not limit:
            return rows
        rows = [rows[number] for number in choose_states([self.marks[row] for row in rows], limit)]
        if limit not in self._said:
            self._said.add(limit)
            marks = [self.marks[row] for row in rows]
            kinds = {name: len({getattr(m, name) for m in marks}) for name in ("prompt", "timestep", "branch", "shape")}
            found = ", ".join(counted(number, name) for name, number in kinds.items())
            announce(f"{self.split}: {limit} states wanted, {len(rows)} of {len(self)} taken: {found}")
        return rows

    def batches(self, size: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the arguments of :meth:`answered`."""
        return (call.arguments for call in self.answered(size, limit))

    def answered(self, size: int, limit: int | None = None) -> Iterator[Call]:
        """Yield the states of :meth:`spread` once, in a fixed order, with the teacher's answers.

        Args:
            size: Most states of a batch; a batch is of states that go together, so there may be fewer.
            limit: See :meth:`spread`.
        """
        return (call for call, _ in self.weighed(self.spread(limit), size))

    def weighed(self, rows: Sequence[Row], size: int) -> Iterator[tuple[Call, Share]]:
        """Yield states that go together, at most ``size``, and what each batch counts in means over all of them."""
        pieces = self.by_shape(rows, size)
        return ((self.batch(piece), share) for piece, share in zip(pieces, self._shares(pieces), strict=True))

    def by_shape(self, rows: Sequence[Row], size: int, padded: bool = True) -> list[list[Row]]:
        """Pieces of at most ``size`` states that go through a model together; unpadded ones are of one shape each."""
        alike: dict[int, list[Row]] = {}
        for row in rows:
            shape = self.marks[row].shape if row in self.marks else -1
            alike.setdefault(self._first_of[shape] if padded and shape >= 0 else shape, []).append(row)
        return [piece[start : start + size] for piece in alike.values() for start in range(0, len(piece), size)]

    def _shares(self, pieces: Sequence[Sequence[Row]]) -> list[Share]:
        """What each piece of a batch counts; an empty one nothing."""
        if len(pieces) == 1:
            return [WHOLE]
        counts = [self._valid_tokens(piece) for piece in pieces]
        names = set.intersection(*(set(c) for c, piece in zip(counts, pieces, strict=True) if piece))
        totals = {name: max(1, sum(c.get(name, 0) for c in counts)) for name in names}
        samples = sum(map(len, pieces))
        return [
            Share(len(piece) / samples, {name: c.get(name, 0) / totals[name] for name in names})
            for c, piece in zip(counts, pieces, strict=True)
        ]

    def _valid_tokens(self, rows: Sequence[Row]) -> dict[str, int]:
        """Valid tokens of states that go together, by the argument that marks them."""
        counts: dict[str, int] = {}
        known = {number: trees.valid_tokens(self.calls[number].arguments) for number, _ in rows}
        for number, row in rows:
            for name, tokens in known[number].items():
                counts[name] = counts.get(name, 0) + tokens[row]
        return counts

    def draw(self, size: int, generator: torch.Generator) -> list[Row]:
        """Draw a batch of ``size`` states (all there are, if fewer), each shape in proportion to its states."""
        rows = []
        places = allot([len(group) for group in self.groups], min(size, len(self)), generator)
        for group, count in zip(self.groups, places, strict=True):
            picks = torch.randint(len(group), (count,), generator=generator).tolist()
            rows += [group[i] for i in sorted(picks)]
        return rows

    def parts(
        self, size: int, generator: torch.Generator, group: Group = SINGLE, accumulate: int = 1
    ) -> Iterator[tuple[Call, Share]]:
        """Draw a batch, and yield this process's pieces of it, one after the other.

        Args:
            size: Samples of the whole batch, over all processes and parts.
            generator: The same in all processes.
            group: The processes that train.
            accumulate: Parts of each process; a part comes in pieces where not all of it goes together.

        Returns:
            Pieces with the teacher's answers, and what each counts. Every process gets as many pieces; one without a
            sample is the batch's first sample with a share of 0.
        """
        return self.share_out(self.draw(size, generator), group, accumulate)

    def share_out(
        self, rows: Sequence[Row], group: Group = SINGLE, accumulate: int = 1
    ) -> Iterator[tuple[Call, Share]]:
        """Yield this process's pieces of a batch whose places are drawn; see :meth:`parts`."""
        count = group.size * accumulate
        parts = [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]
        pieces = [self.by_shape(part, len(rows)) or [[]] for part in parts]
        own = [[p for part in pieces[at : at + accumulate] for p in part] for at in range(0, count, accumulate)]
        most = max(map(len, own))  # a model that is split over the processes runs in all of them at once
        everything = [piece for each in own for piece in each + [[]] * (most - len(each))]
        shares = self._shares(everything)
        for index in range(group.rank * most, (group.rank + 1) * most):
            yield self.batch(everything[index] or rows[:1]), shares[index]


def _recorded_mask(path: Path) -> str:
    """The argument that hides padding, where the capture stage found that the teacher heeds it."""
    about = read_json(path) if path.is_file() else {"mask": ""}
    if not isinstance(about, dict) or not isinstance(about.get("mask"), str):
        raise ArtifactError(f"{path} was not written by ppcl capture; delete it and run again")
    return str(about["mask"])


def _first_shapes(fits: Sequence[tuple[str, int]]) -> list[int]:
    """Number of the first of the shapes that each goes together with.

    Args:
        fits: Of each shape what must be equal, and the length of its text; sorted.
    """
    first_of: list[int] = []
    for number, (others, length) in enumerate(fits):
        first = first_of[-1] if number else 0
        goes_along = fits[first][0] == others and length <= MOST_PADDED * fits[first][1]
        first_of.append(first if goes_along else number)
    return first_of


def _read_calls(path: Path) -> tuple[list[Call], _Recorded]:
    """The calls of one file, and what was recorded with them."""
    tensors, meta = read_tensors(path, masks=True)
    try:
        recorded = _Recorded(**meta)
        tensors |= {name: tensors[twin] for name, twin in recorded.alias.items()}
        calls = []
        for number, node in enumerate(recorded.calls):
            arguments, target = trees.unflatten(node, tensors), tensors.get(f"velocity.{number:02d}")
            if target is None:
                raise ArtifactError(f"{path} was written by an older ppcl; delete {path.parent} and run again")
            finite(target, "velocity", path)
            rows = tuple(recorded.rows[number]) if recorded.rows else ()
            own = frozenset(recorded.per_sample[number] if recorded.per_sample else ())
            calls.append(Call(arguments, target, per_sample=own, whole_rows=rows))
            if len(target) != len(calls[-1].whole_rows) or not len(target):
                raise ValueError(f"{len(target)} answers to {len(calls[-1].whole_rows)} samples")
        if recorded.branches is not None and len(recorded.branches) != len(calls):
            raise ValueError(f"branches of {len(recorded.branches)} calls of {len(calls)}")
        if recorded.jumps and len(recorded.jumps) != len(calls):
            raise ValueError(f"jumps of {len(recorded.jumps)} calls of {len(calls)}")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as reason:
        raise ArtifactError(
            f"{path} was not written by ppcl capture ({shortened(reason, 100)}); delete it and run again"
        ) from None
    return calls, recorded


class _Recorded(BaseModel):
    """What stands beside the tensors of a file of calls."""

    model_config = ConfigDict(strict=True)

    alias: dict[str, str]
    calls: list[dict[str, Any]]
    rows: list[list[Count]] = []
    per_sample: list[list[str]] = []
    prompts: list[str] = []
    branches: list[Count] | None = None
    jumps: list[float] = []
