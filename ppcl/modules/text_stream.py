"""The text stream of a dual-stream block as two linear maps (eq. 8), inside the block's own forward.

Eq. 8 keeps a block's text projections and replaces all else of its text stream: z_p = l_z(z_r),
the text input of the projections, and h_p = l_h(h_r), its text output, with r the nearest kept
block before p. The output of r is what enters p, so both maps can read p's own input h:

    z = Norm(h) A + a,        h' = h + h W + w.

Norm is the block's own LayerNorm without weights. Five small modules make the stock forward
compute this, which is

    z = norm1(h) (1 + scale) + shift;   h += gate1 * to_add_out(attention);
    h += gate2 * ffn(norm2(h) (1 + scale2) + shift2):

norm1 is followed by A, shifts, scales and the first gate are 0 and the second is 1, norm2 does
nothing, and the feed-forward network is W. Hooks, caches and ControlNets see the same block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextOutput(nn.Linear):
    """What the text state gains, h -> h W + w; called as the feed-forward network was."""

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """Map (B, tokens, d) to (B, tokens, d)."""
        return super().forward(input)


class TextInput(nn.Module):
    """norm1 and the modulation of the text in one: h -> Norm(h) A + a.

    Args:
        norm: The block's LayerNorm, without weights.
        features: d.
    """

    def __init__(self, norm: nn.Module, features: int) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, tokens, d) to (B, tokens, d)."""
        mapped: Tensor = self.linear(self.norm(x))
        return mapped


class TextInputZero(TextInput):
    """The same for blocks whose norm1 also makes gates (AdaLayerNormZero)."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Return the mapped x, then first gate 0, shift 0, scale 0, second gate 1, (B, 1) each."""
        zero = x.new_zeros(len(x), 1)
        return super().forward(x), zero, zero, zero, x.new_ones(len(x), 1)


class UnitGate(nn.Module):
    """Modulation of two halves (shift, scale, gate): all 0 but the second gate, which is 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 6) for any (B, d): one number for all features of a token."""
        modulation = x.new_zeros(len(x), 6)
        modulation[:, 5] = 1
        return modulation


class NoOutput(nn.Module):
    """An output layer that gives 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros (B, tokens, 1) for (B, tokens, d)."""
        return x.new_zeros(*x.shape[:-1], 1)


def plain_norm(module: nn.Module) -> nn.LayerNorm | None:
    """The LayerNorm without weights that a norm module is or holds; None if there is none."""
    norm = module if isinstance(module, nn.LayerNorm) else getattr(module, "norm", None)
    return norm if isinstance(norm, nn.LayerNorm) and not list(norm.parameters()) else None


def text_replacement(module: nn.Module, kind: str) -> nn.Module | None:
    """Build one of the five modules, untrained; None if the module cannot be replaced by it."""
    if kind == "text_output":
        linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
        return TextOutput(linears[0].in_features, linears[-1].out_features) if linears else None
    if kind == "text_input":
        norm = plain_norm(module)
        if norm is None:
            return None
        text_input = TextInput if norm is module else TextInputZero
        shape = norm.normalized_shape
        return text_input(nn.LayerNorm(shape, norm.eps, elementwise_affine=False), shape[-1])
    simple = {"unit_gate": UnitGate, "no_output": NoOutput, "identity": nn.Identity}
    return simple[kind]() if kind in simple else None


@torch.no_grad()
def fill_text(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set the affine map of a text module.

    Args:
        module: Changed in place.
        weight: (d, d), as in y = x W + b.
        bias: (d,).
    """
    linear = module.linear if isinstance(module, TextInput) else module
    if isinstance(linear, nn.Linear):
        linear.weight.copy_(weight.T)
        linear.bias.copy_(bias)
