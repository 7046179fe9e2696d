"""Smaller modules in the place of large ones inside a block.

A *replacement* is described by its kind and size, and named by the path of the module it
stands for, so that a config can carry it and a class can rebuild it without its weights:

* ``low_rank``: a linear layer W as up @ down, ``size`` is the rank (modulation layers);
* ``linear``: a feed-forward network as one affine map (eq. 9), ``size`` is not used;
* ``narrow``, ``heads``: fewer neurons or heads, ``size`` is how many stay (:mod:`ppcl.modules.slicing`);
* the modules that make a text stream two linear maps (eq. 8, :mod:`ppcl.modules.text_stream`).

All have closed-form starts. No forward of a block is touched: a replacement is called as the
module was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import ModelError
from ppcl.modules.slicing import SLICED, neurons_of, sliced
from ppcl.modules.text_stream import TEXT_KINDS, text_replacement

KINDS = ("low_rank", "linear", *SLICED, *TEXT_KINDS)


class LowRankLinear(nn.Module):
    """y = up(down(x)): a linear layer of low rank.

    Args:
        in_features: d.
        out_features: o.
        rank: r; d r + r o + o parameters.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        result: Tensor = self.up(self.down(x))
        return result


class LinearFeedForward(nn.Linear):
    """An affine map that is called as the feed-forward network it replaces."""

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """Map (..., d) to (..., o); what else the network was given is ignored."""
        return super().forward(input)


def features_of(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer or of a feed-forward network.

    Raises:
        ModelError: The module has no linear layer.
    """
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ModelError(f"{type(module).__name__} has no linear layer; it cannot be replaced by a smaller one")
    units = neurons_of(module)  # in a gated network the last layer need not be the one that comes out
    last = module.get_submodule(units.columns[0]) if units else linears[-1]
    return linears[0].in_features, last.get_parameter("weight").shape[0]


def replacement(module: nn.Module, part: Mapping[str, Any]) -> nn.Module:
    """Build the replacement of a module, untrained, on its device and in its dtype.

    Args:
        module: What is replaced; it is left as it is.
        part: The ``kind``, the ``size``, and what else the kind needs.

    Raises:
        ModelError: The kind is unknown or does not suit the module.
    """
    kind, linear = part["kind"], isinstance(module, nn.Linear)
    made: nn.Module | None = None
    if kind == "low_rank" and linear:
        made = LowRankLinear(*features_of(module), int(part["size"]))
    elif kind == "linear" and not linear and any(isinstance(m, nn.Linear) for m in module.modules()):
        made = LinearFeedForward(*features_of(module))
    elif kind in SLICED and not linear:
        return sliced(module, part)
    elif kind in TEXT_KINDS:
        made = text_replacement(module, kind)
    if made is None:
        raise ModelError(f"{type(module).__name__} cannot be replaced by '{kind}'; known kinds: {', '.join(KINDS)}")
    like = next(module.parameters(), None)
    return made if like is None else made.to(device=like.device, dtype=like.dtype)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def apply_width(root: nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace modules of a block or of a whole transformer, untrained.

    Args:
        root: Changed in place.
        parts: For each path the ``kind``, the ``size`` and what else describes its replacement.

    Raises:
        ModelError: There is no such module, or the replacement does not suit it.
    """
    for path, part in parts.items():
        try:
            module = root.get_submodule(path)
        except AttributeError:
            raise ModelError(f"{type(root).__name__} has no module '{path}'") from None
        made = replacement(module, part)
        if next(module.parameters(), None) is None:  # a norm without weights: those around it tell where it is
            like = next(root.get_submodule(path.rpartition(".")[0]).parameters(), next(root.parameters()))
            made = made.to(device=like.device, dtype=like.dtype)
        set_module(root, path, made)


@dataclass(frozen=True)
class Metric:
    """What is known of a layer's inputs x: their mean and a root of their covariance, cov = root root^T.

    Attributes:
        mean: (d,).
        root: (d, k), its columns ordered by their share of the variance.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, keep: float = 1 - 1e-9, most: int = 256) -> Metric:
        """Keep the directions that make up a share of the variance, at most ``most`` of them."""
        values, vectors = torch.linalg.eigh(covariance.double())
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        shares = values.cumsum(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        count = min(int((shares < keep).sum()) + 1, most, len(values))
        return cls(mean.double(), vectors[:, :count] * values[:count].sqrt())


def residuals(weight: Tensor, metric: Metric) -> Tensor:
    """How much of a layer's varying output each rank misses, in the metric of its inputs.

    Args:
        weight: (o, d).
        metric: Of its inputs.

    Returns:
        (k + 1,): ||(W - W_r) root|| / ||W root|| for r = 0..k.
    """
    squares = torch.linalg.svdvals(weight.double() @ metric.root).pow(2)
    left = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    shares = left / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares[shares < 1e-12] = 0.0  # rounding
    missed: Tensor = shares.sqrt()
    return missed


@torch.no_grad()
def fill_low_rank(made: LowRankLinear, weight: Tensor, bias: Tensor | None, metric: Metric) -> None:
    """Set a low-rank layer to the best one for the inputs of the metric.

    With U the leading left singular vectors of W root, W_r = U U^T W misses the least variance of
    W x; the bias makes the mean output exact.

    Args:
        made: Changed in place.
        weight: (o, d).
        bias: (o,) or None.
        metric: Of the inputs.
    """
    weight = weight.double()
    rank = made.down.out_features
    left, _, _ = torch.linalg.svd(weight @ metric.root, full_matrices=False)
    basis = left[:, :rank]
    if basis.shape[1] < rank:  # fewer directions were seen than the rank has
        basis = torch.cat([basis, basis.new_zeros(len(basis), rank - basis.shape[1])], 1)
    mean = weight @ metric.mean
    offset = mean - basis @ (basis.T @ mean)
    made.down.weight.copy_(basis.T @ weight)
    made.up.weight.copy_(basis)
    made.up.bias.copy_(offset if bias is None else offset + bias.double())


@torch.no_grad()
def fill_linear(made: LinearFeedForward, weight: Tensor, bias: Tensor) -> None:
    """Set an affine map.

    Args:
        made: Changed in place.
        weight: (d, o), as in y = x W + b.
        bias: (o,).
    """
    made.weight.copy_(weight.T)
    made.bias.copy_(bias)
