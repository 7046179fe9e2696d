"""Random: the floor that a criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.streams import step_generator
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
        return [
            torch.rand(site.units.count, generator=step_generator(seed, number, 67), dtype=torch.float64)
            for number, site in enumerate(sites)
        ]
