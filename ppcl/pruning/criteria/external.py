"""What a criterion from outside the package must be, and give (:mod:`ppcl.common.plugins` loads it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppcl.errors import ConfigError
from ppcl.pruning.criteria.base import Site

METHODS = {"score": ("transformer", "adapter", "sites", "batches", "seed")}  # that a criterion must have


def checked(scores: Any, sites: Sequence[Site], name: str) -> list[Tensor]:
    """Scores as they are used: one float64 tensor on the CPU for each site.

    Args:
        scores: What a criterion returned.
        sites: What it was given.
        name: Of the criterion.

    Raises:
        ConfigError: There are not as many as sites, one is not (units,), or some are NaN or infinite.
    """
    if not isinstance(scores, list | tuple) or len(scores) != len(sites):
        got = str(len(scores)) if isinstance(scores, list | tuple) else type(scores).__name__
        raise ConfigError(f"fit.criterion={name}: got {got} for {len(sites)} sites; expected a list of one tensor each")
    found = []
    for score, site in zip(scores, sites, strict=True):
        where = f"fit.criterion={name}: {site.stack}.{site.block}.{site.path}"
        if not isinstance(score, Tensor) or tuple(score.shape) != (site.units.count,):
            got = str(tuple(score.shape)) if isinstance(score, Tensor) else type(score).__name__
            raise ConfigError(f"{where}: got {got}, expected one score for each of {site.units.count} units")
        bad = int((~torch.isfinite(score)).sum())
        if bad:
            raise ConfigError(f"{where}: {bad} of {len(score)} scores are NaN or infinite; expected numbers")
        found.append(score.detach().double().cpu())
    return found
