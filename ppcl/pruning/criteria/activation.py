"""Activation: a unit is worth how much what it adds to its module's output varies.

For a neuron that is its standard deviation times the norm of its column, Wanda's score
(Sun et al. 2023, arXiv 2306.11695) summed over a column; for a head the same over its
features, taken as independent. What a unit adds on average costs nothing: a bias replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppcl.modules.slicing import matrix_of
from ppcl.pruning.criteria.base import Batches, InputSums, Scores, Site, Sites, watch_inputs
from ppcl.teacher.families import Adapter


class Activation:
    """sqrt(sum over a unit's features of var(h) ||column||^2), summed over the layers that read it."""

    cost = 1.0

    @torch.no_grad()
    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        sums: dict[tuple[int, nn.Linear], InputSums] = {}

        def see(number: int, layer: nn.Linear, h: Tensor) -> None:
            before = sums.get((number, layer)) or InputSums(0, torch.zeros(()), torch.zeros(()))
            first, second = h.sum(0).double(), h.pow(2).sum(0).double()
            sums[number, layer] = InputSums(before.count + len(h), before.first + first, before.second + second)

        watch_inputs(transformer, adapter, sites, batches, see)
        by_site: list[list[tuple[nn.Linear, InputSums]]] = [[] for _ in sites]
        for (number, layer), found in sums.items():
            by_site[number].append((layer, found))
        return [self.score_sums(site, layers) for site, layers in zip(sites, by_site, strict=True)]

    @torch.no_grad()
    def score_sums(self, site: Site, layers: Sequence[tuple[nn.Linear, InputSums]]) -> Tensor:
        """See :class:`ppcl.pruning.criteria.base.SumCriterion`."""
        total = torch.zeros(site.units.count, dtype=torch.float64)
        for layer, sums in layers:
            variance = (sums.second / sums.count - (sums.first / sums.count).pow(2)).clamp_min(0)
            energy = variance * matrix_of(layer).double().pow(2).sum(0)
            total += site.by_unit(energy).sum(-1).cpu()
        return total.sqrt()
