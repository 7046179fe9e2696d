"""Gradients of the weights of some layers, one layer at a time: none of them is kept.

A linear layer's gradient is delta^T x, with x what it is given and delta the gradient of what it gives. Both are at
hand for a moment in the backward pass: what a criterion needs of the gradient is taken there, and the matrix is freed
before the next layer's is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.hooks import removing
from ppcl.modules.parts import join
from ppcl.modules.slicing import features_last
from ppcl.pruning.criteria.base import Batches, Sites, checkpointed, signed_output
from ppcl.teacher.families import Adapter
from ppcl.teacher.families.masks import watch_valid


@dataclass(frozen=True)
class Seen:
    """One call of one layer in the backward pass.

    Attributes:
        number: Of the site.
        name: The layer's path inside the site's module.
        layer: The layer.
        side: 0 if its rows are the units', 1 if its columns are.
        x: What it was given, (states, tokens, i) in float32; a layer that sees no batch axis has one state a call.
        delta: Gradient of <u, v> by what it gave, (states, tokens, o) in float32; padding has none.
        valid: (states, tokens) bool, true where a token is no padding; None where all count.
    """

    number: int
    name: str
    layer: nn.Linear
    side: int
    x: Tensor
    delta: Tensor
    valid: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Nothing in the forward pass; in the backward pass it shows x and the gradient.

    x goes through ``save_for_backward``, so gradient checkpointing frees it and makes it again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.see(x.detach(), gradients[0].detach())
        return gradients[0], None, None, None


def watch_gradients(
    transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int, see: Callable[[Seen], None]
) -> None:
    """Show a criterion every layer that holds weights of the units, once a batch and call.

    Args:
        transformer: The teacher's transformer; no gradient is left in it.
        adapter: Its family.
        sites: Whose layers.
        batches: Calibration states; one backward pass of :func:`ppcl.pruning.criteria.base.signed_output` each.
        seed: For the signs.
        see: Called inside the backward pass.
    """
    first = {spec.name: spec.tokens_first for spec in adapter.stacks}
    taps = []
    for number, site in enumerate(sites):
        for name, (layer, side) in site.weights(transformer, adapter).items():

            def show(
                x: Tensor,
                delta: Tensor,
                valid: Tensor | None,
                at: tuple[int, str, nn.Linear, int] = (number, name, layer, side),
            ) -> None:
                see(Seen(*at, x, delta, valid))

            taps.append(Tap(layer, join(site.path, name), first[site.stack], show))
    tap_gradients(transformer, adapter, taps, batches, seed)


@dataclass(frozen=True)
class Tap:
    """A layer that is looked at in backward passes.

    Attributes:
        layer: The layer.
        path: Where it is inside its block.
        tokens_first: It is given (tokens, states, i).
        see: Called with x, delta and valid as in :class:`Seen`, once a batch and call.
    """

    layer: nn.Linear
    path: str
    tokens_first: bool
    see: Callable[[Tensor, Tensor, Tensor | None], None]


def tap_gradients(transformer: nn.Module, adapter: Adapter, taps: Sequence[Tap], batches: Batches, seed: int) -> None:
    """Run one backward pass of :func:`ppcl.pruning.criteria.base.signed_output` a batch, with some layers tapped.

    Args:
        transformer: No gradient is left in it.
        adapter: Its family.
        taps: Whose gradients are looked at; nothing before the first of them takes part in the backward pass.
        batches: Calibration states.
        seed: For the signs.
    """
    anchor = torch.zeros((), requires_grad=True)  # makes frozen weights' outputs part of the graph

    def hook_of(tap: Tap) -> Callable[[Any, tuple[Any, ...], Tensor], Any]:
        def states_first(values: Tensor) -> Tensor:
            if values.ndim < 3:
                return values.reshape(1, -1, values.shape[-1]).float()
            return values.movedim(int(tap.tokens_first), 0).flatten(1, -2).float()

        def hook(layer: Any, args: tuple[Any, ...], output: Tensor) -> Any:
            valid = valid_of(tap.path, args[0])
            valid = valid.T if valid is not None and tap.tokens_first else valid

            def seen(x: Tensor, delta: Tensor) -> None:
                tap.see(states_first(features_last(layer, x)), states_first(features_last(layer, delta)), valid)

            return _Tap.apply(output, args[0], anchor, seen)  # type: ignore[no-untyped-call]

        return hook

    handles = (tap.layer.register_forward_hook(hook_of(tap)) for tap in taps)
    with watch_valid(transformer, adapter) as valid_of, removing(handles):
        for step, arguments in enumerate(batches):
            with checkpointed(transformer), torch.enable_grad():
                inner = signed_output(transformer, arguments, seed, step)
                torch.autograd.grad(inner, [anchor], allow_unused=True)
