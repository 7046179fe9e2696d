"""Blocks that wait in CPU memory or on disk and come to the device for each call: diffusers' group offloading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

_HOOK = "group_offloading"


@contextmanager
def streamed(
    blocks: Iterable[nn.Module], device: torch.device, disk: Path | None = None, back: bool = True
) -> Iterator[None]:
    """Keep blocks away from the device except while they run; nothing may be differentiated through them meanwhile.

    Args:
        blocks: Whole blocks; each comes and goes as one.
        device: Where they run.
        disk: A folder that receives their weights in a folder of its own, which is removed in the end; without one
            they wait in CPU memory.
        back: Bring them to the device in the end; else they stay in CPU memory.

    Raises:
        OSError: The folder cannot be written.
    """
    from diffusers.hooks import apply_group_offloading

    # only these modules: a hook on the transformer would be shared by every student, which is a shallow copy of it
    holder = nn.Module()
    holder.blocks = nn.ModuleList(blocks)
    if not len(holder.blocks):
        yield
        return
    with ExitStack() as stack:
        place = None
        if disk is not None:
            disk.mkdir(parents=True, exist_ok=True)
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix=".offload-", dir=disk))
        apply_group_offloading(
            holder,
            onload_device=device,
            offload_device=torch.device("cpu"),
            num_blocks_per_group=1,
            offload_to_disk_path=place,
        )
        try:
            yield
        finally:
            for module in holder.blocks:
                _settle(module, device if back else torch.device("cpu"))


def _settle(module: Any, device: torch.device) -> None:
    """Take the hook off a block, and give it back its weights."""
    registry = module._diffusers_hook
    registry.get_hook(_HOOK).group.onload_()
    registry.remove_hook(_HOOK, recurse=False)
    module.__dict__.pop("forward", None)  # the class's own again: a copy of the block must not call this one's
    del module._diffusers_hook
    module.to(device)
