"""NIRVANA: a unit is worth the sum of |dF/dW W| over its weights (Ai et al. 2025, arXiv 2509.14230, its saliency).

F is a functional of the output, here <u, v> with random signs u, summed over a batch as in the paper's one backward
pass. With signs drawn apart for each state, the batch's gradient squared has the mean of the sum of squares over
states. So a batch counts as one draw, and what they show is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.pruning.criteria.base import BACKWARD, Site, unit_sums
from ppcl.pruning.criteria.gradients import Seen, watch_gradients
from ppcl.teacher.families import Adapter


class Nirvana:
    """Plain sum over a unit's rows and columns of |g W|, averaged over batches."""

    cost = BACKWARD

    def score(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        batches: Sequence[dict[str, Any]],
        seed: int,
    ) -> list[Tensor]:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        totals = [torch.zeros(site.units.count, dtype=torch.float64) for site in sites]

        def see(seen: Seen) -> None:
            gradient = seen.delta.flatten(0, 1).T @ seen.x.flatten(0, 1)
            saliency = (gradient * seen.layer.weight.detach().float()).abs()
            totals[seen.number] += unit_sums(saliency, sites[seen.number].units, seen.side).double().cpu()

        watch_gradients(transformer, adapter, sites, batches, seed, see)
        return [total / max(1, len(batches)) for total in totals]
