"""Wanda: a weight is worth |W_ij| times the root mean square of input feature j (Sun et al. 2023, arXiv 2306.11695).

A unit is worth the sum over its columns in the layers that read it, as in Wanda-sp (An et al. 2023, arXiv 2312.11983).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.pruning.criteria.base import Site, unit_sums, watch_inputs
from ppcl.pruning.criteria.masks import wanda_scores
from ppcl.teacher.families import Adapter


class Wanda:
    """Sum over a unit's columns of |W_ij| sqrt(mean x_j^2)."""

    cost = 1.0

    @torch.no_grad()
    def score(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        batches: Sequence[dict[str, Any]],
        seed: int,
    ) -> list[Tensor]:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        squares: dict[tuple[int, nn.Linear], Tensor] = {}
        counts: dict[tuple[int, nn.Linear], int] = {}

        def see(number: int, layer: nn.Linear, x: Tensor) -> None:
            squares[number, layer] = squares.get((number, layer), 0) + x.pow(2).sum(0).double()
            counts[number, layer] = counts.get((number, layer), 0) + len(x)

        watch_inputs(transformer, adapter, sites, batches, see)
        totals = [torch.zeros(site.units.count, dtype=torch.float64) for site in sites]
        for (number, layer), total in squares.items():
            scores = wanda_scores(layer.weight.double(), (total / counts[number, layer]).sqrt())
            totals[number] += unit_sums(scores, sites[number].units, side=1).cpu()
        return totals
