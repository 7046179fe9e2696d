"""FSDP2: split weights over the processes: the student's with gradients and optimizer states, the frozen teacher's.

``fully_shard`` of torch keeps a part of every weight in each process and gathers a block's weights while
the block runs (ZeRO-3 of Rajbhandari et al. 2020), or from its forward pass until its backward pass is done
(ZeRO-2: more memory, half of the gathering). The loop sees the parts (DTensors); files always hold whole
tensors, so a run may go on with any number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.parts import is_part
from ppcl.teacher.families import Adapter

_STATE = "__composable_api"  # what torch's composable calls write into a module's __dict__ under


def shard(student: nn.Module, adapter: Adapter, again: bool = True) -> None:
    """Split a student over all processes, in place, one group of weights a block.

    Args:
        student: Has its own copies of all blocks, equal in all processes.
        adapter: Its family.
        again: Split a block's weights again between its forward and its backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    for spec in adapter.stacks:
        for block in adapter.blocks(student, spec):
            shard_block(block, again)
    fully_shard(student, reshard_after_forward=False)  # what lies outside the blocks is needed to the end


def shard_block(block: nn.Module, again: bool = True) -> None:
    """Split the weights of a block over all processes, in place, as one group; one that is split stays as it is.

    Args:
        block: Equal in all processes, on any device; its part goes to where the processes talk (GPU or CPU).
        again: See :func:`shard`.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(block, FSDPModule):
        fully_shard(block, reshard_after_forward=again)


def unshard(module: nn.Module) -> None:
    """Give every process whole weights again, in modules that no longer know that they were split."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward pass without a backward pass leaves weights gathered, maybe of an older step
    weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    for part in module.modules():
        _forget(part)
    module.load_state_dict(weights, assign=True)


@contextmanager
def split_blocks(blocks: Iterable[nn.Module], home: torch.device | None) -> Iterator[None]:
    """Keep a part of each frozen block in each process; the whole is gathered while a block runs.

    All processes must run the same blocks in the same order meanwhile. After an error the blocks stay split: the other
    processes may not come to gather them.

    Args:
        blocks: Equal in all processes.
        home: Where the whole blocks are put in the end; None leaves them split, for who drops them anyway.
    """
    from torch.distributed import fsdp

    split, hooks = list(blocks), []
    for block in split:
        shard_block(block.requires_grad_(False))
        hooks.append(block.register_forward_hook(_split_again))
    if share := getattr(fsdp, "share_comm_ctx", None):  # of torch 2.10 or so: one set of streams instead of one a block
        share(split)
    yield
    if home is None:
        return
    for block, hook in zip(split, hooks, strict=True):
        hook.remove()
        unshard(block)
        block.to(home)


def _split_again(block: Any, *_: Any) -> None:
    """Drop the gathered whole: torch before 2.8 keeps it where a block is called by itself, whatever it was told."""
    block.reshard()


def whole_copy(block: nn.Module) -> nn.Module:
    """A copy of a block with whole weights, also of one that is split and stays so; all processes must ask at once."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(block, FSDPModule):
        return copy.deepcopy(block)
    block.reshard()
    bare: nn.Module = object.__new__(type(block).__mro__[2])  # FSDP2's modules refuse to be copied
    bare.__dict__ = {
        key: copy.copy(value) if key.endswith("_hooks") else value
        for key, value in block.__dict__.items()
        if not key.startswith(_STATE)
    }
    _without_hooks(bare)  # they know the split block
    own = {id(p): nn.Parameter(whole(p.detach()), p.requires_grad) for p in block.parameters()}
    copied = copy.deepcopy(bare, own)
    for module in copied.modules():
        _without_hooks(module)
    return copied


def _forget(module: nn.Module) -> None:
    """Take off the hooks, the state and the class that ``fully_shard`` gave a module: the next call would split it."""
    from torch.distributed import _composable_state
    from torch.distributed.fsdp import FSDPModule

    _without_hooks(module)
    for key in [name for name in module.__dict__ if name.startswith(_STATE)]:
        del module.__dict__[key]
    getattr(_composable_state, "_module_state_mapping", {}).pop(module, None)  # else it could not be split again
    if isinstance(module, FSDPModule):
        module.__class__ = type(module).__mro__[2]  # FSDPX(FSDPModule, X)


def _without_hooks(module: nn.Module) -> None:
    """Take off the hooks and marks of ``fully_shard``, which lie on a block's inner modules, too."""
    for hooks in (value for name, value in module.__dict__.items() if name.endswith("_hooks")):
        for key, hook in list(hooks.items()):
            called = getattr(hook, "hook", hook)  # those of state dicts are wrapped
            if str(getattr(called, "__module__", "")).startswith(("torch.distributed.fsdp", __name__)):
                del hooks[key]
    for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        module.__dict__.pop(mark, None)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what all processes' parts make together; all processes must ask at once."""
    split: Any = tensor
    gathered: Tensor = split.full_tensor() if is_part(tensor) else tensor
    return gathered


@torch.no_grad()
def average_into(averages: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """Move averages towards targets: a + weight (t - a)."""
    if any(map(is_part, averages)):
        for average, target in zip(averages, targets, strict=True):
            average.lerp_(target, weight)
    else:
        torch._foreach_lerp_(averages, targets, weight)
