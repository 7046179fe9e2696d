"""The modes of :mod:`ppcl.planning.planner` as searches: they look at measured costs alone, and run no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ppcl.artifacts import CompressionPlan
from ppcl.planning.planner import plan
from ppcl.searches.base import Context


@dataclass(frozen=True)
class Planned:
    """A mode of the planner.

    Attributes:
        mode: Its name.
    """

    mode: str
    deterministic: ClassVar[bool] = True

    def cost(self, context: Context) -> float:
        """Nothing: what it reads was measured before."""
        return 0

    def choose(self, context: Context) -> CompressionPlan:
        """See :func:`ppcl.planning.planner.plan`."""
        settings = context.settings.model_copy(update={"mode": self.mode})
        return plan(context.analysis, context.candidates, settings)


optimal, paper, uniform, influence, allocation = map(
    Planned, ("optimal", "paper", "uniform", "influence", "allocation")
)
