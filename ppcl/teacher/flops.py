"""Counting parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from ppcl.common.hooks import removing

if TYPE_CHECKING:
    from torch import nn


def count_params(module: nn.Module) -> int:
    """Number of parameters of a module; bitsandbytes packs several of them into a number."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in module.parameters())
    return sum(map(prod, shapes))


def count_flops(
    transformer: nn.Module, stacks: Mapping[str, Sequence[nn.Module]], call: Callable[[], Any], samples: int
) -> dict[str, Any]:
    """Count forward FLOPs by the shapes of what is multiplied.

    The same on every device, under every attention backend and on meta tensors, masks and causality left aside. It is
    torch's counter with the formulas that it lacks.

    Args:
        transformer: The whole transformer, or a part of one.
        stacks: Its block lists by name.
        call: Runs the transformer once.
        samples: Batch size of that call.

    Returns:
        ``{"total": FLOPs a sample, "stacks": {name: [FLOPs of each block a sample]}}``.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    marks: dict[str, list[int]] = {name: [0] * len(blocks) for name, blocks in stacks.items()}

    def add(name: str, index: int, sign: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[name][index] += sign * counter.get_total_flops()

        return hook

    places = [(name, index, block) for name, blocks in stacks.items() for index, block in enumerate(blocks)]
    before = (block.register_forward_pre_hook(add(name, index, -1)) for name, index, block in places)
    after = (block.register_forward_hook(add(name, index, 1)) for name, index, block in places)
    with removing(before), removing(after), _torch_attention(transformer), torch.no_grad(), counter:
        call()
    return {
        "total": counter.get_total_flops() // samples,
        "stacks": {name: [flops // samples for flops in counts] for name, counts in marks.items()},
    }


def _formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of the kernels that torch's counter leaves out, or refuses with grouped queries, in some versions."""
    import torch

    names = {full.removeprefix("aten::").split(".")[0] for full in torch._C._dispatch_get_all_op_names()}
    kernels = [name for name in names if name.startswith("_scaled_dot_product_") and not name.endswith("_backward")]
    return {
        torch.ops.aten._int_mm: _product_flops,
        **{getattr(torch.ops.aten, name): _attention_flops for name in kernels},
    }


def _product_flops(first: Sequence[int], second: Sequence[int], **_named: Any) -> int:
    """FLOPs of a product of matrices of the shapes (rows, inner) and (inner, columns)."""
    return 2 * prod(first) * second[1]


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_options: Any, **_named: Any
) -> int:
    """FLOPs of softmax(Q K^T) V from the shapes (B, heads, tokens, width); keys may have fewer heads than queries."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@contextmanager
def _torch_attention(module: nn.Module) -> Iterator[None]:
    """Let diffusers call torch's own attention: nobody can count the kernels of other packages."""
    from diffusers.models.attention_dispatch import attention_backend

    processors = [processor for part in module.modules() if (processor := getattr(part, "processor", None))]
    backends = [(p, p._attention_backend) for p in processors if getattr(p, "_attention_backend", None)]
    try:
        for processor, _ in backends:
            processor._attention_backend = None
        with attention_backend("native"):
            yield
    finally:
        for processor, backend in backends:
            processor._attention_backend = backend
