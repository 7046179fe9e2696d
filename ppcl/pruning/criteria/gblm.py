"""GBLM: Wanda's score with the gradient beside the activation (Das et al. 2023, arXiv 2311.04902, GBLM-Pruner).

A weight is worth |W_ij| a_j + alpha |W_ij| ||G_ij||, with a_j the root mean square of input feature j and ||G_ij|| the
norm of its gradient over samples; a unit the sum over its weights. The paper's alpha of 100 belongs to its loss and
its number of samples, so here both terms are brought to the same median in every layer first, and alpha is 1. Of
the paper's two norms the 1-norm: its sums over samples reduce to units as they come.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppcl.modules.slicing import matrix_of
from ppcl.pruning.criteria.base import BACKWARD, Batches, Scores, Sites, unit_sums
from ppcl.pruning.criteria.gradients import Seen as SeenCall
from ppcl.pruning.criteria.gradients import watch_gradients
from ppcl.pruning.criteria.wanda import wanda_scores
from ppcl.pruning.criteria.weights import Needs, Seen
from ppcl.teacher.families import Adapter
from ppcl.teacher.families.masks import valid_rows


class Gblm:
    """Both terms summed to units, layer by layer.

    Args:
        alpha: Weight of the gradient's term, once both have the same median.
    """

    cost = BACKWARD

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        squares: dict[tuple[int, str], Tensor] = {}  # sum of x^2, (i,)
        counts: dict[tuple[int, str], int] = {}
        slopes: dict[tuple[int, str], Tensor] = {}  # sum over states of |W| |G|, (units,)

        def see(seen: SeenCall) -> None:
            key, size = (seen.number, seen.name), matrix_of(seen.layer).detach().float().abs()
            rows = valid_rows(seen.x, seen.valid)
            squares[key] = squares.get(key, 0) + rows.pow(2).sum(0).double()
            counts[key] = counts.get(key, 0) + len(rows)
            for x, delta in zip(seen.x, seen.delta, strict=True):
                sums = unit_sums((delta.T @ x).abs() * size, sites[seen.number].units, seen.side, seen.name)
                slopes[key] = slopes.get(key, 0) + sums.double()

        watch_gradients(transformer, adapter, sites, batches, seed, see)
        totals = []
        for number, site in enumerate(sites):
            total = torch.zeros(site.units.count, dtype=torch.float64)
            for name, (layer, side) in site.weights(transformer, adapter).items():
                key = (number, name)
                if key in squares:  # a layer that feeds nothing has no gradient
                    weighted = matrix_of(layer).detach().double().abs() * (squares[key] / counts[key]).sqrt()
                    sums = unit_sums(weighted, site.units, side, name)
                    total += at_same_median(sums, slopes[key], self.alpha).cpu()
            totals.append(total)
        return totals


class GblmWeights:
    """Both terms of single weights, weighed alike by their medians in each layer."""

    needs: Needs = "gradients"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return gblm_scores(seen.weight, seen.feature_rms, seen.gradient_norm)


def gblm_scores(weight: Tensor, feature_rms: Tensor, gradient_norm: Tensor, alpha: float | None = None) -> Tensor:
    """|W_ij| a_j + alpha |W_ij| ||G_ij||.

    Args:
        weight: (o, i).
        feature_rms: (i,), the root mean square of each input feature.
        gradient_norm: (o, i), 1- or 2-norm over samples of each weight's gradient.
        alpha: The paper's constant; without one both terms get the same median in this layer.
    """
    first, second = wanda_scores(weight, feature_rms), weight.abs() * gradient_norm
    return at_same_median(first, second) if alpha is None else first + alpha * second


def at_same_median(first: Tensor, second: Tensor, alpha: float = 1.0) -> Tensor:
    """Add two terms of one layer, the second scaled to the median of the first and then by alpha.

    Args:
        first: Of any shape.
        second: Of the same shape; left out where its median is 0.
        alpha: Its weight.
    """
    median = second.median()
    scale = first.median() / median if median > 0 else torch.zeros_like(median)
    return first + alpha * scale * second
