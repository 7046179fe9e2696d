"""Magnitude: a unit is worth the norm of its weights. It needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.adapters import Adapter
from ppcl.criteria.base import Site


class Magnitude:
    """The norm of a unit's rows and columns, biases left out."""

    @torch.no_grad()
    def score(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        batches: Sequence[dict[str, Any]],
        seed: int,
    ) -> list[Tensor]:
        """See :class:`ppcl.criteria.base.Criterion`."""
        found = []
        for site in sites:
            module, units = site.module(transformer, adapter), site.units
            total = torch.zeros(units.count, dtype=torch.float64)
            for names, side in ((units.rows, 0), (units.columns, 1)):
                for name in names:
                    weight = module.get_submodule(name).get_parameter("weight").double()
                    squares = weight.pow(2).sum(1 - side).cpu()
                    # a head's features lie side by side, a gated network's in two halves
                    by_unit = squares.reshape(units.count, -1) if units.kind == "heads" else None
                    total += squares.reshape(-1, units.count).sum(0) if by_unit is None else by_unit.sum(1)
            found.append(total.sqrt())
        return found
