"""What a search is, and what it may look at. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.errors import ConfigError
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import Runs, from_ladder, removal_ladder
from ppcl.student.plan import CompressionPlan, free_blocks
from ppcl.teacher.model_info import ModelInfo

if TYPE_CHECKING:
    from ppcl.pruning.searches.teacher import Teacher


@dataclass(frozen=True)
class Context:
    """What a search may look at: never evaluation data.

    Attributes:
        analysis: Intervals, probes' errors and block influence.
        candidates: Runs and smaller modules with their costs.
        settings: Budget, protected blocks, and the ``search_*`` settings.
        seed: Fixes what is drawn at random.
        open_teacher: Loads the teacher; None where there is none.
    """

    analysis: Analysis
    candidates: Candidates
    settings: PlanConfig
    seed: int = 0
    open_teacher: Callable[[], Teacher] | None = None

    @property
    def model(self) -> ModelInfo:
        """The teacher's sizes."""
        return self.analysis.model

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher and its recorded states, loaded when first asked for.

        Raises:
            ConfigError: There is none.
        """
        if self.open_teacher is None:
            raise ConfigError(
                f"plan.mode={self.settings.mode} runs the teacher, and there is none here; "
                "choose a mode that needs none, e.g. optimal"
            )
        return self.open_teacher()

    @property
    def needed_savings(self) -> float:
        """What a plan must save: parameters, or FLOPs for a speed-up; 0 or less if the teacher meets the budget."""
        model, (kind, value) = self.model, self.settings.budget
        if kind == "keep":
            return model.params * (1 - value - 1e-9)
        if kind == "speedup":
            return model.flops * (1 - 1 / (value - 1e-9)) if value > 1 else 0.0
        whole = model.stored.of_teacher() if model.stored else model.params * model.bytes_per_param
        return model.params * (1 - (value * 1e9 - model.other_bytes) / whole)

    def removable(self) -> list[tuple[str, int]]:
        """(stack, block) of all blocks that can go while the block before them stays, in execution order.

        Raises:
            ConfigError: There are none.
        """
        blocks = []
        for stack in self.model.stacks:
            low, high = free_blocks(self.model, stack, self.settings)
            blocks += [(stack.name, index) for index in range(low + 1, high)]
        if not blocks:
            raise ConfigError(
                f"plan.mode={self.settings.mode}: no block can go; lower plan.protect_first or plan.protect_last"
            )
        return blocks

    def first_that_fits(self, ladder: Sequence[Runs], start: str | None = None) -> CompressionPlan:
        """The plan of the first set of runs that meets the budget.

        Args:
            ladder: Sets of runs (stack, first, last), from none to many.
            start: What every substitute starts from; None is the best known start of each.

        Raises:
            BudgetError: None does; the message names the nearest feasible budget.
        """
        return from_ladder(self.model, ladder, self.candidates, self.settings, start)

    def remove_in_order(self, order: Sequence[tuple[str, int]], start: str | None = None) -> CompressionPlan:
        """The plan that removes blocks in this order, as few as the budget asks; each joins the kept block before it.

        Args:
            order: Of :meth:`removable`.
            start: See :meth:`first_that_fits`.

        Raises:
            BudgetError: All of them are not enough.
        """
        return self.first_that_fits(removal_ladder(order), start)


class Search(Protocol):
    """Chooses a plan under a budget.

    One that may set ``deterministic = True``: its plan does not depend on the seed, and tables over several seeds ask
    for it once.
    """

    def cost(self, context: Context) -> float:
        """State what :meth:`choose` will cost, before it starts.

        Args:
            context: What it will be given.

        Returns:
            Teacher forwards, about: how often the whole transformer runs on one state. A backward pass counts as two.
        """
        ...

    def choose(self, context: Context) -> CompressionPlan:
        """Choose the plan.

        Args:
            context: What may be looked at; its settings have the budget.

        Returns:
            A plan that meets the budget (:meth:`Context.first_that_fits` and :meth:`Context.remove_in_order` make
            one).

        Raises:
            BudgetError: None of this search's plans does.
        """
        ...
