"""FSDP2: split the student's weights, gradients and optimizer states over the processes.

``fully_shard`` of torch keeps a part of every weight in each process and gathers a block's weights while
the block runs (ZeRO-3 of Rajbhandari et al. 2020), or from its forward pass until its backward pass is done
(ZeRO-2: more memory, half of the gathering). The loop sees the parts (DTensors); files always hold whole
tensors, so a run may go on with any number of processes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.adapters import Adapter


def shard(student: nn.Module, adapter: Adapter, again: bool = True) -> None:
    """Split a student over all processes, in place, one group of weights a block.

    Args:
        student: Has its own copies of all blocks, equal in all processes.
        adapter: Its family.
        again: Split a block's weights again between its forward and its backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    for name, value in list(student.__dict__.items()):
        if name.endswith("_hooks") or "_hooks_" in name:  # a student is a shallow copy: the teacher must not see these
            student.__dict__[name] = copy.copy(value)
    for spec in adapter.stacks:
        for block in adapter.blocks(student, spec):
            fully_shard(block, reshard_after_forward=again)
    fully_shard(student, reshard_after_forward=False)  # what lies outside the blocks is needed to the end


def unshard(student: nn.Module) -> None:
    """Give every process whole weights again, in modules that no longer know that they were split."""
    from torch.distributed.fsdp import FSDPModule

    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves weights gathered, maybe of an older step
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_part(parameter):
                module._parameters[name] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    for module in student.modules():
        _forget(module)


def _forget(module: nn.Module) -> None:
    """Take off the hooks and the class that ``fully_shard`` gave a module: the next call would split it again."""
    from torch.distributed.fsdp import FSDPModule

    for hooks in (value for name, value in module.__dict__.items() if name.endswith("_hooks")):
        for key, hook in list(hooks.items()):
            if hook.__module__.startswith("torch.distributed.fsdp"):
                del hooks[key]
    if isinstance(module, FSDPModule):
        module.__class__ = type(module).__mro__[2]  # FSDPX(FSDPModule, X)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is split over the processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what all processes' parts make together; all processes must ask at once."""
    split: Any = tensor
    gathered: Tensor = split.full_tensor() if is_part(tensor) else tensor
    return gathered


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of ``like`` and, if that is split, split as it is."""
    if not is_part(like) or tensor.ndim != like.ndim:  # AdamW counts its steps in a number
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    split: Any = like
    return distribute_tensor(tensor.to(like.device), split.device_mesh, split.placements)


@torch.no_grad()
def average_into(averages: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """Move averages towards targets: a + weight (t - a)."""
    if any(map(is_part, averages)):
        for average, target in zip(averages, targets, strict=True):
            average.lerp_(target, weight)
    else:
        torch._foreach_lerp_(averages, targets, weight)
