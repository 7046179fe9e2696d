"""The modes of :mod:`ppcl.pruning.planner` as searches: they look at measured costs alone, and run no teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ppcl.pruning.planner import plan
from ppcl.pruning.searches.base import Context
from ppcl.student.plan import CompressionPlan


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
        """See :func:`ppcl.pruning.planner.plan`."""
        settings = context.settings.model_copy(update={"mode": self.mode})
        return plan(context.analysis, context.candidates, settings)


optimal, paper, uniform, influence, allocation = map(
    Planned, ("optimal", "paper", "uniform", "influence", "allocation")
)
