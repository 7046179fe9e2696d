"""Random: the floor that a criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppcl.common.streams import Stream, step_generator
from ppcl.pruning.criteria.base import Batches, Scores, Sites
from ppcl.pruning.criteria.weights import Needs, Seen
from ppcl.teacher.families import Adapter


class Random:
    """Scores drawn evenly from 0 to 1; the seed and a site's place among the others fix them."""

    cost = 0.0

    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        generators = (step_generator(seed, number, Stream.RANDOM_UNITS) for number in range(len(sites)))
        return [
            torch.rand(site.units.count, generator=generator, dtype=torch.float64)
            for site, generator in zip(sites, generators, strict=True)
        ]


class RandomWeights:
    """Drawn evenly from 0 to 1."""

    needs: Needs = "weights"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return torch.rand(seen.weight.shape, generator=seen.generator).to(seen.weight.device)
