"""Counting parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def count_params(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(
    transformer: nn.Module, stacks: Mapping[str, Sequence[nn.Module]], call: Callable[[], Any], samples: int
) -> dict[str, Any]:
    """Count forward FLOPs with torch's counter.

    Args:
        transformer: The whole transformer.
        stacks: Its block lists by name.
        call: Runs the transformer once.
        samples: Batch size of that call.

    Returns:
        ``{"total": FLOPs a sample, "stacks": {name: [FLOPs of each block a sample]}}``.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    marks: dict[str, list[int]] = {name: [0] * len(blocks) for name, blocks in stacks.items()}
    handles = []
    for name, blocks in stacks.items():
        for index, block in enumerate(blocks):

            def before(*_: Any, name: str = name, index: int = index) -> None:
                marks[name][index] -= counter.get_total_flops()

            def after(*_: Any, name: str = name, index: int = index) -> None:
                marks[name][index] += counter.get_total_flops()

            handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        with torch.no_grad(), counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {
        "total": counter.get_total_flops() // samples,
        "stacks": {name: [flops // samples for flops in counts] for name, counts in marks.items()},
    }
