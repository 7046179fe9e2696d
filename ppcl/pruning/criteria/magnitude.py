"""Magnitude: a unit is worth the norm of its weights. It needs no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppcl.modules.slicing import matrix_of
from ppcl.pruning.criteria.base import Batches, Scores, Sites, unit_sums
from ppcl.pruning.criteria.weights import Needs, Seen
from ppcl.teacher.families import Adapter


class Magnitude:
    """The norm of a unit's rows and columns, biases left out."""

    cost = 0.0

    @torch.no_grad()
    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        scores = []
        for site in sites:
            total = torch.zeros(site.units.count, dtype=torch.float64)
            for name, (layer, side) in site.weights(transformer, adapter).items():
                total += unit_sums(matrix_of(layer).double().pow(2), site.units, side, name).cpu()
            scores.append(total.sqrt())
        return scores


class MagnitudeWeights:
    """|W|."""

    needs: Needs = "weights"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return seen.weight.abs()
