"""Tensors of which a process holds a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is split over the processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of ``like`` and, if that is split, split as it is."""
    if not is_part(like) or tensor.ndim != like.ndim:  # AdamW counts its steps in a number
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    split: Any = like
    return distribute_tensor(tensor.to(like.device), split.device_mesh, split.placements)
