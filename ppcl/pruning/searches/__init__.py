"""Searches: who chooses the plan. The third extension point, beside criteria and allocations.

A search is a class with two methods (:class:`ppcl.pruning.searches.base.Search`) and an entry in ``SEARCHES`` of
:mod:`ppcl.config.extensions`, or a class in a file of yours; ``plan.mode`` names it. What every plan must be
(:func:`checked`) is looked at here, so no search can hand on a wrong one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from ppcl.config.extensions import SEARCHES
from ppcl.errors import ConfigError
from ppcl.pruning.planner import is_allowed_segment, meets
from ppcl.pruning.searches.base import Context, Search
from ppcl.student.plan import CompressionPlan
from ppcl.student.prediction import predict, with_short_vectors

__all__ = ["SEARCHES", "Context", "Search", "choose"]

logger = logging.getLogger(__name__)


def choose(name: str, context: Context, say: Callable[[str], None] = logger.info) -> CompressionPlan:
    """Choose a plan by a search's name, and check what comes out.

    Args:
        name: Of ``SEARCHES``, or ``file.py:ClassName`` or ``module:ClassName``; in place of the settings' mode.
        context: What searches may look at.
        say: Is told what the search will cost before it starts, if it runs the teacher at all.

    Returns:
        The plan, with the cost that the search stated in ``teacher_forwards``.

    Raises:
        BudgetError: No plan of this search meets the budget.
        ConfigError: The search cannot be loaded, or gives something else than a plan.
        UserError: It does not fit the family, or there is not what it looks at.
    """
    search: Search = SEARCHES.named(name)
    context = dataclasses.replace(context, settings=context.settings.model_copy(update={"mode": name}))
    stated: Any = search.cost(context)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 <= stated < float("inf"):
        raise ConfigError(f"plan.mode={name}: cost gave {stated!r}, expected a number of teacher forwards, 0 or more")
    if stated:
        say(
            f"plan.mode={name}: about {stated:,.0f} teacher forwards (the transformer once on one state; "
            "a backward pass counts as two)"
        )
    plan = checked(search.choose(context), context)
    return dataclasses.replace(plan, mode=name, teacher_forwards=float(stated))


def checked(plan: Any, context: Context) -> CompressionPlan:
    """Return a plan with its prediction counted anew.

    Args:
        plan: What a search returned.
        context: What it was given.

    Raises:
        ConfigError: It is no plan of this teacher, moves protected blocks, or misses the budget.
    """
    model, settings = context.model, context.settings
    where = f"plan.mode={settings.mode}"
    if not isinstance(plan, CompressionPlan):
        raise ConfigError(f"{where}: got {type(plan).__name__}, expected a CompressionPlan")
    if plan.model != model or set(plan.stacks) != {stack.name for stack in model.stacks}:
        raise ConfigError(f"{where}: the plan is for another model; expected stacks {[s.name for s in model.stacks]}")
    for stack in model.stacks:
        covered = [i for s in plan.stacks[stack.name] for i in range(s.first, s.last + 1)]
        if covered != list(range(stack.num_blocks)):
            raise ConfigError(f"{where}: {stack.name}: got blocks {covered}, expected each of {stack.num_blocks} once")
        for segment in plan.stacks[stack.name]:
            if segment.is_run and not is_allowed_segment(model, stack.name, segment.first, segment.last, settings):
                raise ConfigError(
                    f"{where}: {stack.name} {segment.first}-{segment.last} takes a protected block; "
                    "see plan.protect_first and plan.protect_last"
                )
    prediction = predict(model, plan.stacks, plan.predicted.error)
    kind, value = settings.budget
    if not meets(prediction, kind, value):
        raise ConfigError(
            f"{where}: the plan misses the budget plan.{kind}={value:g} (it keeps {prediction.param_ratio:.3f} of the "
            f"parameters, {prediction.speedup:.2f} times as fast); expected one that meets it, or a BudgetError"
        )
    stacks = with_short_vectors(plan.stacks)
    return dataclasses.replace(plan, budget={kind: value}, stacks=stacks, predicted=prediction)
