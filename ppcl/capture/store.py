"""The states between the teacher's blocks while a sweep goes on: in memory where they fit, else on disk.

A *level* is what all batches are at one boundary. A sweep reads one level and writes the next. The old one goes only
when the new one is complete and everybody is finished with the block in between, so that a process that is killed
anywhere in between does that block again, and nothing else. Levels that somebody still needs are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.common.files import read_mapping, remove, write_json
from ppcl.common.tensor_files import open_tensors, write_tensors
from ppcl.training.distributed import SINGLE, Group

MEMORY = 2e9  # bytes of states that are kept in memory


class StateStore:
    """States by level and batch.

    Args:
        folder: Receives what does not fit; a folder a level, a file a batch.
        fingerprint: Identifies what is swept (weights, states, batches): what another sweep left behind is removed.
        memory: Bytes that may be kept in memory, in all levels together; 0: all goes to disk.
        group: The processes that sweep; all see the folder, and each holds the batches that it writes.
    """

    def __init__(self, folder: Path, fingerprint: str, memory: float = MEMORY, group: Group = SINGLE) -> None:
        self.folder, self.fingerprint, self.memory, self.group = folder, fingerprint, memory, group
        self.level: int | None = None  # the last complete one
        self._complete: set[int] = set()  # those that are whole and still here
        self._held: Counter[int] = Counter()
        self._in_memory: dict[int, dict[int, dict[str, Tensor]]] = {}
        self._used = 0  # bytes in memory
        self._on_disk = False

    def hold(self, level: int) -> None:
        """Keep a level until it is released as often as it is held."""
        self._held[level] += 1

    def release(self, level: int) -> None:
        """Give up a level; what nobody holds goes with the next :meth:`commit`."""
        self._held[level] -= 1

    def resume(self, numbers: Collection[int]) -> int | None:
        """Find what an interrupted sweep left; whatever is of no use is removed.

        Args:
            numbers: This process's batches.

        Returns:
            The last complete level; None where the sweep has to begin anew.
        """
        marker = self.folder / "level.json"
        state = read_mapping(marker) if marker.is_file() else {}
        is_whole = all(isinstance(state.get(name), list) for name in ("held", "complete"))
        # what is held now but was not then is gone, if the sweep came past it
        here = is_whole and state.get("fingerprint") == self.fingerprint and self._holds() <= set(state["held"])
        if here:
            self.level, self._complete = state["level"], set(state["complete"])
            paths = (self._path(level, number) for level in self._needed() for number in numbers)
            here = all(path.is_file() for path in paths)
        begun = not self.group.any(not here)
        self.group.barrier()  # all have read the marker
        if begun:
            self._on_disk = True
            self._retire()
        else:
            self.close()
        return self.level

    def write(self, level: int, number: int, states: Mapping[str, Tensor]) -> None:
        """Write a batch's states at a level; from any device, in any shape."""
        if not self._on_disk:
            # a copy of its own: what leaves a block may be a view of something larger
            kept = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in states.items()}
            self._in_memory.setdefault(level, {})[number] = kept
            self._used += _bytes(kept)
            if self._used > self.memory:
                self._spill()
            return
        write_tensors(self._path(level, number), states)

    def read(
        self, level: int, number: int, device: torch.device, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, Tensor]:
        """Read a batch's states at a level, of wanted names.

        Raises:
            ArtifactError: They are not there, or damaged.
        """
        if not self._on_disk:
            kept = self._in_memory[level][number]
            return {name: tensor.to(device, copy=True) for name, tensor in kept.items() if wanted(name)}
        with self._open(level, number) as file:  # mapped: memory of its own on the device alone
            names = filter(wanted, file.keys())
            return {name: file.get_tensor(name).to(device, copy=True) for name in names}

    def rows(
        self, level: int, number: int, rows: Sequence[int], axis: int, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, Tensor]:
        """Read some states of a batch at a level, on the CPU; of a file nothing else is read.

        Args:
            level: Of the states.
            number: Of the batch.
            rows: Numbers of the states in it.
            axis: Which axis counts states.
            wanted: Names that are wanted.
        """
        if not self._on_disk:
            picked = torch.tensor(rows)
            return {n: t.index_select(axis, picked) for n, t in self._in_memory[level][number].items() if wanted(n)}
        with self._open(level, number) as file:
            views = {name: file.get_slice(name) for name in filter(wanted, file.keys())}
            whole = (slice(None),) * axis
            return {
                name: torch.cat([view[(*whole, slice(row, row + 1))] for row in rows], axis)
                for name, view in views.items()
            }

    def commit(self, level: int) -> None:
        """Say that a level is complete and its predecessor has served; whatever nobody holds is removed."""
        self.level = level
        self._complete.add(level)
        on_disk = self.group.any(self._on_disk)  # which also waits for the others' files
        if self.group.is_main and on_disk:
            complete, held = sorted(self._complete), sorted(self._holds())
            marker = {"fingerprint": self.fingerprint, "level": level, "complete": complete, "held": held}
            write_json(self.folder / "level.json", marker)
        self.group.barrier()
        self._retire()

    def close(self) -> None:
        """Remove everything; the sweep is done."""
        self.level, self._on_disk, self._used = None, False, 0
        self._complete.clear()
        self._in_memory.clear()
        self.group.barrier()
        if self.group.is_main:
            remove(self.folder)
        self.group.barrier()

    def _holds(self) -> set[int]:
        return {level for level, count in self._held.items() if count > 0}

    def _needed(self) -> set[int]:
        """The complete levels that are of use."""
        return self._complete & {self.level, *self._holds()}

    def _retire(self) -> None:
        """Remove all other levels."""
        self._complete = self._needed()
        for level in self._in_memory.keys() - self._complete:
            self._used -= sum(map(_bytes, self._in_memory.pop(level).values()))
        if self.group.is_main and self.folder.is_dir():
            needed = {self._folder(level) for level in self._complete}
            for folder in self.folder.iterdir():
                if folder.is_dir() and folder not in needed:
                    remove(folder)
        self.group.barrier()

    def _spill(self) -> None:
        """Move everything to disk; the sweep goes on there."""
        self._on_disk = True
        for level, batches in self._in_memory.items():
            for number, states in batches.items():
                self.write(level, number, states)
        self._in_memory.clear()

    def _folder(self, level: int) -> Path:
        return self.folder / f"level-{level}"

    def _open(self, level: int, number: int) -> AbstractContextManager[Any]:
        return open_tensors(self._path(level, number), remedy=f"delete {self.folder} and run again")

    def _path(self, level: int, number: int) -> Path:
        return self._folder(level) / f"{number}.safetensors"


def _bytes(states: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in states.values())
