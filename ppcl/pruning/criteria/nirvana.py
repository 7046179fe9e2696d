"""NIRVANA: a unit is worth the sum of |dF/dW W| over its weights (Ai et al. 2025, arXiv 2509.14230, its saliency).

F is a functional of the output, here <u, v> with random signs u, summed over a batch as in the paper's one backward
pass. With signs drawn apart for each state, the batch's gradient squared has the mean of the sum of squares over
states. So a batch counts as one draw, and what they show is averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppcl.modules.slicing import matrix_of
from ppcl.pruning.criteria.base import BACKWARD, Batches, Scores, Sites, unit_sums
from ppcl.pruning.criteria.gradients import Seen as SeenCall
from ppcl.pruning.criteria.gradients import watch_gradients
from ppcl.pruning.criteria.weights import Needs, Seen
from ppcl.teacher.families import Adapter


class Nirvana:
    """Plain sum over a unit's rows and columns of |g W|, averaged over batches."""

    cost = BACKWARD

    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        totals = [torch.zeros(site.units.count, dtype=torch.float64) for site in sites]

        def see(seen: SeenCall) -> None:
            gradient = seen.delta.flatten(0, 1).T @ seen.x.flatten(0, 1)
            saliency = (gradient * matrix_of(seen.layer).detach().float()).abs()
            sums = unit_sums(saliency, sites[seen.number].units, seen.side, seen.name)
            totals[seen.number] += sums.double().cpu()

        watch_gradients(transformer, adapter, sites, batches, seed, see)
        return [total / max(1, len(batches)) for total in totals]


class NirvanaWeights:
    """|W_ij G_ij| with the gradient summed over a batch."""

    needs: Needs = "batch_gradients"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return seen.weight.abs() * seen.gradient_norm
