"""Criteria: which neurons and heads of a block are worth keeping.

A criterion is a file like ``magnitude.py`` and an entry here, or a class in a file of yours; ``fit.criterion`` names
it. What is known of single weights, and masks of them, is in :mod:`ppcl.pruning.criteria.masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ppcl.common.plugins import load_object
from ppcl.pruning.criteria.activation import Activation
from ppcl.pruning.criteria.base import Criterion, Site
from ppcl.pruning.criteria.bip import Bip
from ppcl.pruning.criteria.external import METHODS, checked
from ppcl.pruning.criteria.gblm import Gblm
from ppcl.pruning.criteria.magnitude import Magnitude
from ppcl.pruning.criteria.nirvana import Nirvana
from ppcl.pruning.criteria.random import Random
from ppcl.pruning.criteria.taylor import Taylor
from ppcl.pruning.criteria.wanda import Wanda
from ppcl.pruning.criteria.weights import weight_criterion_named
from ppcl.teacher.families import Adapter

__all__ = [
    "CRITERIA",
    "WEIGHT_CRITERIA",
    "Criterion",
    "Site",
    "check_criterion",
    "criterion_named",
    "unit_cost",
    "unit_scores",
]

CRITERIA: dict[str, Criterion] = {
    "activation": Activation(),
    "bip": Bip(),
    "gblm": Gblm(),
    "magnitude": Magnitude(),
    "nirvana": Nirvana(),
    "random": Random(),
    "taylor": Taylor(),
    "wanda": Wanda(),
}


def criterion_named(name: str) -> Criterion:
    """The criterion of a name in the table, or of ``file.py:ClassName`` or ``module:ClassName``.

    Raises:
        ConfigError: It cannot be loaded.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    found: Criterion = load_object(name, "fit.criterion", METHODS)
    return found


def unit_cost(name: str, states: int) -> float | None:
    """What a criterion costs, in runs of the transformer on one state; None where one from outside does not say."""
    cost = getattr(criterion_named(name), "cost", None)
    return None if cost is None else float(cost) * states


def check_criterion(config: Any, stage: str) -> None:
    """Load what a stage scores with, to find what is wrong with it before anything of an earlier attempt is removed.

    Args:
        config: A :class:`ppcl.config.RunConfig`.
        stage: ``fit`` (units) or ``distill`` (weights, if it is sparse).

    Raises:
        ConfigError: It cannot be loaded.
    """
    if stage == "fit":
        criterion_named(config.fit.criterion)
    elif config.distill.sparsity.zeros:
        weight_criterion_named(config.distill.sparsity.criterion)


def unit_scores(
    name: str,
    transformer: nn.Module,
    adapter: Adapter,
    sites: Sequence[Site],
    batches: Sequence[dict[str, Any]],
    seed: int,
) -> list[Tensor]:
    """Score units by a criterion's name, and check what comes out.

    Args:
        name: See :func:`criterion_named`.
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: Whose units.
        batches: Calibration states.
        seed: Fixes what is drawn at random.

    Returns:
        For each site (units,) in float64, finite; more is worth more.

    Raises:
        ConfigError: The criterion cannot be loaded, or gives something else.
    """
    return checked(criterion_named(name).score(transformer, adapter, sites, batches, seed), sites, name)
