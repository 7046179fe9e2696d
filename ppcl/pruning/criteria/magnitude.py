"""Magnitude: a unit is worth the norm of its weights. It needs no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
            for layer, side in site.weights(transformer, adapter).values():
                total += unit_sums(layer.weight.double().pow(2), site.units, side).cpu()
            scores.append(total.sqrt())
        return scores


class MagnitudeWeights:
    """|W|."""

    needs: Needs = "weights"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return seen.weight.abs()
