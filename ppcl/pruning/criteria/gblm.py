"""GBLM: Wanda's score with the gradient beside the activation (Das et al. 2023, arXiv 2311.04902, GBLM-Pruner).

A weight is worth |W_ij| a_j + alpha |W_ij| ||G_ij||, with a_j the root mean square of input feature j and ||G_ij|| the
norm of its gradient over samples; a unit the sum over its weights. The paper's alpha of 100 belongs to its loss and
its number of samples, so here both terms are brought to the same median in every layer first, and alpha is 1. Of
the paper's two norms the 1-norm: its sums over samples reduce to units as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.pruning.criteria.base import BACKWARD, Site, unit_sums
from ppcl.pruning.criteria.gradients import Seen, watch_gradients
from ppcl.pruning.criteria.masks import at_same_median
from ppcl.teacher.families import Adapter


class Gblm:
    """Both terms summed to units, layer by layer.

    Args:
        alpha: Weight of the gradient's term, once both have the same median.
    """

    cost = BACKWARD

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def score(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        batches: Sequence[dict[str, Any]],
        seed: int,
    ) -> list[Tensor]:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        squares: dict[tuple[int, str], Tensor] = {}  # sum of x^2, (i,)
        counts: dict[tuple[int, str], int] = {}
        slopes: dict[tuple[int, str], Tensor] = {}  # sum over states of |W| |G|, (units,)

        def see(seen: Seen) -> None:
            key, size = (seen.number, seen.name), seen.layer.weight.detach().float().abs()
            squares[key] = squares.get(key, 0) + seen.x.flatten(0, 1).pow(2).sum(0).double()
            counts[key] = counts.get(key, 0) + seen.x.shape[0] * seen.x.shape[1]
            for x, delta in zip(seen.x, seen.delta, strict=True):
                sums = unit_sums((delta.T @ x).abs() * size, sites[seen.number].units, seen.side)
                slopes[key] = slopes.get(key, 0) + sums.double()

        watch_gradients(transformer, adapter, sites, batches, seed, see)
        totals = []
        for number, site in enumerate(sites):
            total = torch.zeros(site.units.count, dtype=torch.float64)
            for name, (layer, side) in site.weights(transformer, adapter).items():
                key = (number, name)
                if key in squares:  # a layer that feeds nothing has no gradient
                    weighted = layer.weight.detach().double().abs() * (squares[key] / counts[key]).sqrt()
                    total += at_same_median(unit_sums(weighted, site.units, side), slopes[key], self.alpha).cpu()
            totals.append(total)
        return totals
