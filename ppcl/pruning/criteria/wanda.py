"""Wanda: a weight is worth |W_ij| times the root mean square of input feature j (Sun et al. 2023, arXiv 2306.11695).

A unit is worth the sum over its columns in the layers that read it, as in Wanda-sp (An et al. 2023, arXiv 2312.11983).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppcl.modules.slicing import matrix_of
from ppcl.pruning.criteria.base import Batches, Scores, Sites, unit_sums, watch_inputs
from ppcl.pruning.criteria.weights import Needs, Seen
from ppcl.teacher.families import Adapter


class Wanda:
    """Sum over a unit's columns of |W_ij| sqrt(mean x_j^2)."""

    cost = 1.0

    @torch.no_grad()
    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        squares: dict[tuple[int, nn.Linear], Tensor] = {}
        counts: dict[tuple[int, nn.Linear], int] = {}

        def see(number: int, layer: nn.Linear, x: Tensor) -> None:
            squares[number, layer] = squares.get((number, layer), 0) + x.pow(2).sum(0).double()
            counts[number, layer] = counts.get((number, layer), 0) + len(x)

        watch_inputs(transformer, adapter, sites, batches, see)
        totals = [torch.zeros(site.units.count, dtype=torch.float64) for site in sites]
        for (number, layer), total in squares.items():
            units, rms = sites[number].units, (total / counts[number, layer]).sqrt()
            scores = wanda_scores(matrix_of(layer).double(), rms)
            totals[number] += unit_sums(scores, units, 1, units.columns[0]).cpu()
        return totals


class WandaWeights:
    """|W_ij| a_j, with a_j the root mean square of input feature j."""

    needs: Needs = "inputs"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return wanda_scores(seen.weight, seen.feature_rms)


def wanda_scores(weight: Tensor, feature_rms: Tensor) -> Tensor:
    """|W_ij| a_j (eq. 1, with the mean in the place of the sum over tokens).

    Args:
        weight: (o, i).
        feature_rms: (i,), the root mean square of each input feature.
    """
    return weight.abs() * feature_rms
