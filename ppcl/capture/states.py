"""The recorded states of one split, and batches of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.common.files import read_tensors
from ppcl.errors import ArtifactError
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call
from ppcl.training.distributed import SINGLE, WHOLE, Group, Share


class States:
    """The recorded states of one split.

    Args:
        folder: What :func:`capture` wrote.
        split: ``train`` or ``held-out``.

    Raises:
        ArtifactError: Nothing was recorded, or a file is damaged.
    """

    def __init__(self, folder: Path, split: str) -> None:
        paths = sorted(folder.glob(f"{split}-*.safetensors"))
        if not paths:
            raise ArtifactError(f"{folder} holds no {split} states; run ppcl capture first")
        self.calls: list[Call] = []
        groups: dict[str, list[tuple[int, int]]] = {}
        self.prompts: dict[tuple[int, int], str] = {}  # of each state: told apart, not read
        for path in paths:
            tensors, meta = read_tensors(path)
            if meta is None:
                raise ArtifactError(f"{path} was not written by ppcl capture; delete it and run again")
            tensors |= {name: tensors[twin] for name, twin in meta["alias"].items()}
            for number, node in enumerate(meta["calls"]):
                arguments, target = trees.unflatten(node, tensors), tensors.get(f"velocity.{number:02d}")
                if target is None:
                    raise ArtifactError(f"{path} was written by an older ppcl; delete {folder} and run again")
                rows, own = (meta[name][number] if name in meta else () for name in ("rows", "per_sample"))
                call = Call(arguments, target, per_sample=frozenset(own), whole_rows=tuple(rows))
                # guidance may double the samples of a call, and pictures may share a caption
                prompts = meta.get("prompts") or [f"{path.name} {row}" for row in call.whole_rows]
                members = groups.setdefault(trees.signature(arguments, call.per_sample), [])
                for place, row in enumerate(call.whole_rows):
                    members.append((len(self.calls), place))
                    self.prompts[len(self.calls), place] = prompts[row % len(prompts)]
                self.calls.append(call)
        self.groups = [groups[key] for key in sorted(groups)]

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def halves(self) -> tuple[States, States]:
        """Split the states into two sets of disjoint prompts.

        Raises:
            ArtifactError: They are of one prompt.
        """
        found = sorted(set(self.prompts.values()))
        if len(found) < 2:
            raise ArtifactError("the recorded states are of one prompt and cannot be split; capture.num_prompts is low")
        halves = copy.copy(self), copy.copy(self)
        for number, half in enumerate(halves):
            own = set(found[number::2])
            groups = ([row for row in group if self.prompts[row] in own] for group in self.groups)
            half.groups = [group for group in groups if group]
        return halves

    def assemble(self, rows: Sequence[tuple[int, int]]) -> Call:
        """The call of some states of one shape, given their places."""
        by_call: dict[int, list[int]] = {}
        for call, row in rows:
            by_call.setdefault(call, []).append(row)
        parts = [self.calls[c].take(picked) for c, picked in by_call.items()]
        own = parts[0].per_sample
        joined: dict[str, Any] = trees.join([part.arguments for part in parts], own)
        places = tuple((c, row) for c, picked in by_call.items() for row in picked)
        return Call(joined, torch.cat([part.velocity for part in parts]), places, own)

    def largest(self, size: int) -> dict[str, Any]:
        """Arguments of a batch of at most ``size`` states, of the shapes that take the most room."""
        batches = (self.assemble(group[:size]).arguments for group in self.groups)
        return max(batches, key=lambda arguments: sum(t.numel() for t in arguments.values() if isinstance(t, Tensor)))

    def batches(self, size: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the arguments of :meth:`answered`."""
        return (call.arguments for call in self.answered(size, limit))

    def answered(self, size: int, limit: int | None = None) -> Iterator[Call]:
        """Yield all states once, in a fixed order, in batches of at most ``size``, with the teacher's answers.

        With ``limit``, about that many states, spread evenly over the set.
        """
        return map(self.assemble, self.places(size, limit))

    def places(self, size: int, limit: int | None = None) -> Iterator[list[tuple[int, int]]]:
        """Yield the places of the states of each batch of :meth:`answered`."""
        stride = max(1, len(self) // limit) if limit else 1
        left = limit if limit else len(self)
        for group in self.groups:
            rows = group[::stride][:left]
            left -= len(rows)
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def draw(self, size: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw the places of a batch of states of one shape, groups in proportion to their size."""
        shares = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(shares, 1, generator=generator))]
        picks = torch.randint(len(group), (min(size, len(group)),), generator=generator).tolist()
        return [group[i] for i in sorted(picks)]

    def sample(self, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Draw the arguments of a batch of states of one shape."""
        return self.assemble(self.draw(size, generator)).arguments

    def parts(
        self, size: int, generator: torch.Generator, group: Group = SINGLE, accumulate: int = 1
    ) -> Iterator[tuple[Call, Share]]:
        """Draw the batch that :meth:`sample` would, and yield this process's parts of it, one after the other.

        Args:
            size: Samples of the whole batch, over all processes and parts.
            generator: The same in all processes.
            group: The processes that train.
            accumulate: Parts of each process.

        Returns:
            Parts with the teacher's answers, and what each counts. Every process gets as many parts; one without a
            sample (the batch is smaller than the number of parts) is the first sample with a share of 0.
        """
        return self.share_out(self.draw(size, generator), group, accumulate)

    def share_out(self, rows: Sequence[tuple[int, int]], group: Group, accumulate: int) -> Iterator[tuple[Call, Share]]:
        """Yield this process's parts of a batch whose places are drawn; see :meth:`parts`."""
        count = group.size * accumulate
        if count == 1:
            yield self.assemble(rows), WHOLE
            return
        valid = self._valid_tokens(rows)
        for index in range(group.rank * accumulate, (group.rank + 1) * accumulate):
            own = slice(index * len(rows) // count, (index + 1) * len(rows) // count)
            tokens = {name: sum(counts[own]) / max(1, sum(counts)) for name, counts in valid.items()}
            yield self.assemble(rows[own] or rows[:1]), Share(len(rows[own]) / len(rows), tokens)

    def _valid_tokens(self, rows: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
        """Valid tokens of each state, by the argument that marks them."""
        masks = {
            name
            for name, value in self.calls[rows[0][0]].arguments.items()
            if "mask" in name and isinstance(value, Tensor) and value.ndim == 2
        }
        return {name: [int(self.calls[call].arguments[name][row].bool().sum()) for call, row in rows] for name in masks}
