"""Memory on the CPU for what comes and goes in large pieces of the same size, such as the weights of blocks."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64  # bytes, where a tensor may begin
SPARE = 2  # pieces that wait for their next use


class Pieces:
    """Copies tensors into one piece of memory, which is used again when the last of them is gone.

    Tensors that come and go one by one, block after block, leave holes behind them that the C library keeps: 0.8 GB
    were measured at 60 blocks of 75 MB. Asking the system for every piece anew costs more than the copy itself.
    """

    def __init__(self) -> None:
        self._spare: list[mmap.mmap] = []

    def copies(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Copy tensors, by name, in these dtypes."""
        sizes = [tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()]
        starts = [0, *itertools.accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes)]
        memory, copies = self._piece(starts[-1]), {}
        for (name, tensor), start, size in zip(tensors.items(), starts, sizes, strict=False):
            copies[name] = memory[start : start + size].view(dtypes[name]).view(tensor.shape).copy_(tensor)
        return copies

    def _piece(self, size: int) -> Tensor:
        piece = self._waiting(size := max(size, mmap.PAGESIZE)) or mmap.mmap(-1, size)
        array = np.frombuffer(piece, np.uint8)  # lives as long as any tensor in it
        weakref.finalize(array, self._give_back, piece).atexit = False
        return torch.from_numpy(array)

    def _waiting(self, size: int) -> mmap.mmap | None:
        """A piece of this size, which no other thread gets; those of other sizes are dropped."""
        while self._spare:
            try:
                piece = self._spare.pop()  # one step, as several threads may read
            except IndexError:
                break
            if len(piece) == size:
                return piece
        return None

    def _give_back(self, piece: mmap.mmap) -> None:
        self._spare.append(piece)
        del self._spare[:-SPARE]
