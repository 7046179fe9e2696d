"""Activation: a unit is worth how much what it adds to its module's output varies.

For a neuron that is its standard deviation times the norm of its column, Wanda's score
(Sun et al. 2023, arXiv 2306.11695) summed over a column; for a head the same over its
features, taken as independent. What a unit adds on average costs nothing: a bias replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.pruning.criteria.base import Site, watch_inputs
from ppcl.teacher.families import Adapter


class Activation:
    """sqrt(sum over a unit's features of var(h) ||column||^2), summed over the layers that read it."""

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
        sums: dict[tuple[int, nn.Linear], list[Any]] = {}

        def see(number: int, layer: nn.Linear, h: Tensor) -> None:
            entry = sums.setdefault((number, layer), [0, 0.0, 0.0])
            entry[0] += len(h)
            entry[1] = entry[1] + h.sum(0).double()
            entry[2] = entry[2] + h.pow(2).sum(0).double()

        watch_inputs(transformer, adapter, sites, batches, see)
        totals = [torch.zeros(site.units.count, dtype=torch.float64) for site in sites]
        for (number, layer), (count, first, second) in sums.items():
            variance = (second / count - (first / count).pow(2)).clamp_min(0)
            energy = variance * layer.weight.double().pow(2).sum(0)
            totals[number] += sites[number].by_unit(energy).sum(-1).cpu()
        return [total.sqrt() for total in totals]
