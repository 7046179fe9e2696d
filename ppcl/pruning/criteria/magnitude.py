"""Magnitude: a unit is worth the norm of its weights. It needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.pruning.criteria.base import Site, unit_sums
from ppcl.teacher.families import Adapter


class Magnitude:
    """The norm of a unit's rows and columns, biases left out."""

    cost = 0.0

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
        found = []
        for site in sites:
            total = torch.zeros(site.units.count, dtype=torch.float64)
            for layer, side in site.weights(transformer, adapter).values():
                total += unit_sums(layer.weight.double().pow(2), site.units, side).cpu()
            found.append(total.sqrt())
        return found
