"""Smaller modules in the place of large ones inside a block.

A *replacement* is described by its kind and size, and named by the path of the module it
stands for, so that a config can carry it and a class can rebuild it without its weights:

* ``low_rank``: a linear layer W as up @ down, ``size`` is the rank (modulation layers);
* ``linear``: a feed-forward network as one affine map (eq. 9), ``size`` is not used;
* ``narrow``, ``heads``, ``parallel``: fewer neurons or heads, ``size`` is how many stay (:mod:`ppcl.modules.slicing`);
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
from ppcl.modules.parts import KINDS, SLICED, TEXT_KINDS, check_part
from ppcl.modules.slicing import neurons_of, slice_units, sliced
from ppcl.modules.text_stream import text_replacement


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


def affine_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (o, d) and bias (o,) of a linear layer, or of the one that a low-rank layer stands for."""
    if isinstance(module, LowRankLinear):
        return module.up.weight.float() @ module.down.weight.float(), module.up.bias
    return module.get_parameter("weight"), getattr(module, "bias", None)


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
    check_part(dict(part) if isinstance(part, Mapping) else part)
    kind, linear = part["kind"], isinstance(module, nn.Linear | LowRankLinear)
    smaller: nn.Module | None = None
    if kind == "low_rank" and linear:
        features = features_of(module)
        if part["size"] > min(features):
            raise ModelError(f"a rank of {part['size']} is no smaller layer of {features[0]} to {features[1]} features")
        smaller = LowRankLinear(*features, part["size"])
    elif kind == "linear" and not linear and any(isinstance(m, nn.Linear) for m in module.modules()):
        smaller = LinearFeedForward(*features_of(module))
    elif kind in SLICED and not linear:
        return sliced(module, part)
    elif kind in TEXT_KINDS:
        smaller = text_replacement(module, kind)
    if smaller is None:
        raise ModelError(f"{type(module).__name__} cannot be replaced by '{kind}'; known kinds: {', '.join(KINDS)}")
    like = next(module.parameters(), None)
    return smaller if like is None else smaller.to(device=like.device, dtype=like.dtype)


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
    if not isinstance(parts, Mapping):
        raise ModelError(f"smaller modules are {str(parts)[:100]}, expected a description by each module's path")
    for path, part in parts.items():
        is_cut = isinstance(part, Mapping) and part.get("kind") in SLICED
        try:
            module = root.get_submodule(path) if path or is_cut else None
        except AttributeError:
            module = None
        if module is None:
            raise ModelError(f"{type(root).__name__} has no module '{path}'")
        if is_cut:
            slice_units(module, part)
            continue
        smaller = replacement(module, part)
        if next(module.parameters(), None) is None:  # a norm without weights: those around it tell where it is
            like = next(root.get_submodule(path.rpartition(".")[0]).parameters(), next(root.parameters()))
            smaller = smaller.to(device=like.device, dtype=like.dtype)
        set_module(root, path, smaller)


@dataclass(frozen=True)
class InputStatistics:
    """What is known of a layer's inputs x: their mean and a root of their covariance, cov = root root^T.

    Attributes:
        mean: (d,).
        root: (d, k), its columns ordered by their share of the variance.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, rows: Tensor, keep: float = 1 - 1e-9, most: int = 256) -> InputStatistics:
        """Keep the directions that make up a share of the rows' variance, at most ``most`` of them.

        Args:
            rows: Inputs, (n, d).
            keep: The share.
            most: The most directions.
        """
        rows = rows.double()
        mean = rows.mean(0)
        _, values, vectors = torch.linalg.svd((rows - mean) / len(rows) ** 0.5, full_matrices=False)
        shares = values.pow(2).cumsum(0) / values.pow(2).sum().clamp_min(torch.finfo(torch.float64).tiny)
        count = min(int((shares < keep).sum()) + 1, most, len(values))
        return cls(mean, vectors[:count].T * values[:count])


def residuals(weight: Tensor, fitted: InputStatistics, judge: InputStatistics) -> Tensor:
    """How much of a layer's varying output each rank misses.

    Args:
        weight: (o, d).
        fitted: Of the inputs that the ranks are fitted on, see :func:`fill_low_rank`.
        judge: Of the inputs that they are judged on, better others: a rank does well where it was fitted.

    Returns:
        (k + 1,): sqrt(E ||W_r(x) - W x||^2 / E ||W x - E W x||^2) over the judge's x, for r = 0..k.
    """
    weight = weight.double()
    left, _, _ = torch.linalg.svd(weight @ fitted.root, full_matrices=False)
    varying = weight @ judge.root
    centred = torch.cat([varying, (weight @ (judge.mean - fitted.mean))[:, None]], 1)
    missed = centred.pow(2).sum() - (left.T @ centred).pow(2).sum(1).cumsum(0)
    squares = torch.cat([centred.pow(2).sum()[None], missed])
    shares = squares / varying.pow(2).sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares[shares < 1e-12] = 0.0  # rounding
    return shares.sqrt()


@torch.no_grad()
def fill_low_rank(module: LowRankLinear, weight: Tensor, bias: Tensor | None, inputs: InputStatistics) -> None:
    """Set a low-rank layer to the best one for its inputs.

    With U the leading left singular vectors of W root, W_r = U U^T W misses the least variance of
    W x; the bias makes the mean output exact.

    Args:
        module: Changed in place.
        weight: (o, d).
        bias: (o,) or None.
        inputs: What is known of them.
    """
    weight = weight.double()
    rank = module.down.out_features
    left, _, _ = torch.linalg.svd(weight @ inputs.root, full_matrices=False)
    basis = left[:, :rank]
    if basis.shape[1] < rank:  # fewer directions were seen than the rank has
        basis = torch.cat([basis, basis.new_zeros(len(basis), rank - basis.shape[1])], 1)
    mean = weight @ inputs.mean
    offset = mean - basis @ (basis.T @ mean)
    module.down.weight.copy_(basis.T @ weight)
    module.up.weight.copy_(basis)
    module.up.bias.copy_(offset if bias is None else offset + bias.double())


@torch.no_grad()
def fill_linear(module: LinearFeedForward, weight: Tensor, bias: Tensor) -> None:
    """Set an affine map.

    Args:
        module: Changed in place.
        weight: (d, o), as in y = x W + b.
        bias: (o,).
    """
    module.weight.copy_(weight.T)
    module.bias.copy_(bias)
