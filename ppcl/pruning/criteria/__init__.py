"""Criteria: which neurons, heads and single weights of a block are worth keeping.

A criterion of units is a class in a file like ``magnitude.py`` and an entry in ``CRITERIA`` of
:mod:`ppcl.config.extensions`, or a class in a file of yours; ``fit.criterion`` names it. Those of single weights
(``sparsity.criterion``) are in the same files, and what they have in common in :mod:`ppcl.pruning.criteria.weights`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ppcl.config.extensions import CRITERIA, WEIGHT_CRITERIA
from ppcl.errors import ConfigError
from ppcl.pruning.criteria.base import Batches, Criterion, Scores, Site, Sites, checked_scores
from ppcl.teacher.families import Adapter

__all__ = ["CRITERIA", "WEIGHT_CRITERIA", "Criterion", "Site", "unit_cost", "unit_scores"]


def unit_cost(name: str, states: int) -> float | None:
    """What a criterion costs, in runs of the transformer on one state; None where one from outside does not say."""
    cost = getattr(CRITERIA.named(name), "cost", None)
    return None if cost is None else float(cost) * states


def unit_scores(
    name: str, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int
) -> Scores:
    """Score units by a criterion's name, and check what comes out.

    Args:
        name: Of ``CRITERIA``, or ``file.py:ClassName`` or ``module:ClassName``.
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: Whose units.
        batches: Calibration states.
        seed: Fixes what is drawn at random.

    Returns:
        For each site (units,) in float64 on the CPU, finite; more is worth more.

    Raises:
        ConfigError: The criterion cannot be loaded, or gives something else.
    """
    scores = CRITERIA.named(name).score(transformer, adapter, sites, batches, seed)
    if not isinstance(scores, list | tuple) or len(scores) != len(sites):
        got = str(len(scores)) if isinstance(scores, list | tuple) else type(scores).__name__
        raise ConfigError(f"fit.criterion={name}: got {got} for {len(sites)} sites; expected a list of one tensor each")
    return [checked_site_scores(name, score, site) for score, site in zip(scores, sites, strict=True)]


def checked_site_scores(name: str, scores: Tensor, site: Site) -> Tensor:
    """The scores of one site, in float64 on the CPU, if they can be used; see :func:`unit_scores`."""
    where = f"fit.criterion={name}: {site.stack}.{site.block}.{site.path}"
    count = site.units.count
    return checked_scores(scores, (count,), where, f"one score for each of {count} units").double().cpu()
