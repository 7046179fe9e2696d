"""Criteria: which neurons and heads of a block are worth keeping.

A criterion is a file like ``magnitude.py`` and an entry here; ``fit.criterion`` names it.
"""

from ppcl.criteria.activation import Activation
from ppcl.criteria.base import Criterion, Site
from ppcl.criteria.magnitude import Magnitude
from ppcl.criteria.taylor import Taylor

__all__ = ["CRITERIA", "Criterion", "Site"]

CRITERIA: dict[str, Criterion] = {
    "activation": Activation(),
    "magnitude": Magnitude(),
    "taylor": Taylor(),
}
