"""Which tokens are no padding: the one place that reads the masks that blocks are given.

Families write them differently: bool, 0 and 1, or numbers that are added to the attention's logits (0 or a large
negative one); over one stream's tokens or over those of all streams; (B, N), (B, 1, 1, N) or (B, 1, N, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.hooks import removing
from ppcl.errors import ModelError
from ppcl.teacher.families.base import Adapter, StackSpec

ATTENDED = -100.0  # what is added to the logits of a token that counts; exp(-100) is 0 in float32
Valid = Callable[[str, Tensor], Tensor | None]


def as_bool(mask: Tensor) -> Tensor:
    """Bring a mask of any form to (B, N), true where some query may attend to the token."""
    if mask.is_floating_point():
        added = float(mask.max()) <= 0  # a mask of ones and zeros has a one
        mask = mask > ATTENDED if added else mask > 0
    else:
        mask = mask != 0
    return mask.flatten(1, -2).any(1) if mask.ndim > 2 else mask


def valid_tokens(stack: StackSpec, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the masks of a block call.

    Args:
        stack: The block's stack; ``masks`` names the arguments.
        arguments: All named arguments of the call, states included.

    Returns:
        For each stream that has a mask (B, tokens) bool, true where a token is no padding.

    Raises:
        ModelError: A mask is neither as long as its stream nor as all streams together.
    """
    masks = {stream: mask for stream, name in stack.masks.items() if isinstance(mask := arguments.get(name), Tensor)}
    if not masks:
        return {}
    counts = _counts(stack, arguments)
    found = {}
    for stream, mask in masks.items():
        batch = stack.turn(arguments[stack.inputs[stream]]).shape[0]
        valid = as_bool(mask)
        if valid.shape[-1] == sum(counts.values()):
            before = sum(counts[other] for other in list(counts)[: list(counts).index(stream)])
            valid = valid[:, before : before + counts[stream]]
        elif valid.shape[-1] != counts[stream]:
            raise ModelError(
                f"{stack.name}: got a mask {stack.masks[stream]} of {tuple(mask.shape)}, expected {counts[stream]} "
                f"tokens ({stream}) or {sum(counts.values())} (all streams) last; mend `masks` of the family's adapter"
            )
        found[stream] = valid.expand(batch, -1)
    return found


def _counts(stack: StackSpec, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of each stream, in the order in which a mask over all streams has them."""
    return {stream: stack.turn(arguments[name]).shape[1] for stream, name in stack.inputs.items()}


def stream_of(stack: StackSpec, path: str) -> str:
    """Whose tokens a module inside a block of two streams sees, where their numbers do not tell."""
    text = stack.ffn.get("text")
    is_text = (text is not None and f"{path}.".startswith(f"{text}.")) or "add" in path
    return "text" if is_text and "text" in stack.inputs else next(iter(stack.inputs))


def valid_of(stack: StackSpec, arguments: Mapping[str, Any], path: str, x: Tensor) -> Tensor | None:
    """Which rows of what a module inside a block is given are no padding.

    Args:
        stack: The block's stack.
        arguments: Of the block's call.
        path: The module inside the block.
        x: (B, tokens, features) of one stream or of all together; (tokens, B, features) in a stack of that kind.

    Returns:
        A bool of x's first two sizes; None where all rows count.
    """
    valid = valid_tokens(stack, arguments) if x.ndim == 3 else {}
    if not valid:
        return None
    counts, tokens, own = _counts(stack, arguments), stack.turn(x).shape[1], stream_of(stack, path)
    if counts[own] != tokens:
        own = next((stream for stream, count in counts.items() if count == tokens), "")
    if own:
        mask = valid.get(own)
    elif tokens == sum(counts.values()):
        batch = stack.turn(x).shape[0]
        every = {stream: x.new_ones(batch, count, dtype=torch.bool) for stream, count in counts.items()}
        mask = torch.cat(list({**every, **valid}.values()), dim=1)
    else:
        mask = None
    return mask if mask is None else stack.turn(mask)


def valid_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """What counts of (..., features), as (rows, features)."""
    return x.flatten(0, -2) if valid is None else x[valid]


@contextmanager
def watch_valid(transformer: nn.Module, adapter: Adapter) -> Iterator[Valid]:
    """While a transformer runs, answer :func:`valid_of` for modules inside the block that runs at the moment."""
    now: list[tuple[StackSpec, dict[str, Any]]] = []

    def watch(spec: StackSpec) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now[:] = [(spec, adapter.bind(block, args, kwargs))]

        return hook

    def left(*_: Any) -> None:
        now.clear()

    def answer(path: str, x: Tensor) -> Tensor | None:
        return valid_of(*now[0], path, x) if now else None

    blocks = [(spec, block) for spec in adapter.stacks for block in adapter.blocks(transformer, spec)]
    entered = (block.register_forward_pre_hook(watch(spec), with_kwargs=True) for spec, block in blocks)
    ended = (block.register_forward_hook(left, always_call=True) for _, block in blocks)
    with removing(entered), removing(ended):
        yield answer
