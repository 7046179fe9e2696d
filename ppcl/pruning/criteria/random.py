"""Random: the floor that a criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.streams import Stream, step_generator
from ppcl.pruning.criteria.base import Site
from ppcl.teacher.families import Adapter


class Random:
    """Scores drawn evenly from 0 to 1; the seed and a site's place among the others fix them."""

    cost = 0.0

    def score(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        batches: Sequence[dict[str, Any]],
        seed: int,
    ) -> list[Tensor]:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        generators = (step_generator(seed, number, Stream.RANDOM_UNITS) for number in range(len(sites)))
        return [
            torch.rand(site.units.count, generator=generator, dtype=torch.float64)
            for site, generator in zip(sites, generators, strict=True)
        ]
