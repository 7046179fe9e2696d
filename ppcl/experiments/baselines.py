"""Plans of equal size by several criteria, and one rule for the starts of their substitutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.config import PlanConfig
from ppcl.distill.local import best_starts
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import Runs, influence_ladder, layout_of_runs, paper_ladder, plan, uniform_ladder
from ppcl.run import Session
from ppcl.student.assembly import RunKey
from ppcl.student.plan import CompressionPlan, Segment
from ppcl.student.prediction import predict
from ppcl.teacher.model_info import ModelInfo

BASELINES = {"paper": "the paper's intervals", "uniform": "uniform", "influence": "block influence"}
OURS = "optimal"


def removed_blocks(runs: Runs) -> int:
    """Blocks that a set of runs saves."""
    return sum(last - first for _, first, last in runs)


def nearest_rung(ladder: Sequence[Runs], count: int) -> Runs:
    """The set of runs that removes ``count`` blocks, or the nearest number (the smaller of two)."""
    return min(ladder, key=lambda runs: (abs(removed_blocks(runs) - count), removed_blocks(runs)))


def plan_from_runs(model: ModelInfo, runs: Runs, mode: str, candidates: Candidates) -> CompressionPlan:
    """Turn runs into a plan with its prediction; its budget is the number of removed blocks."""
    layout = layout_of_runs(model, runs, candidates)
    budget = {"removed_blocks": float(removed_blocks(runs))}
    return CompressionPlan(model, mode, budget, layout, predict(model, layout))


def plans_of_equal_size(
    analysis: Analysis, candidates: Candidates, settings: PlanConfig
) -> tuple[dict[str, CompressionPlan], dict[str, str]]:
    """The optimal plan of depth alone under the budget, and each baseline's plan with as many blocks removed.

    Returns:
        Plans by mode, the optimal one first, and a note for each baseline that offers no such
        number; its nearest plan is taken, or none if that would be the teacher itself.
    """
    best = plan(analysis, candidates, settings.model_copy(update={"mode": OURS, "width": ()}))
    count = removed_blocks(run_keys(best))
    costs = {(c.stack, c.first, c.last): c for c in candidates.candidates}
    ladders = {
        "paper": paper_ladder(analysis, costs, settings),
        "uniform": uniform_ladder(analysis.model, settings),
        "influence": influence_ladder(analysis, settings),
    }
    plans, notes = {OURS: best}, {}
    for mode, ladder in ladders.items():
        runs = nearest_rung(ladder, count)
        if (removed := removed_blocks(runs)) != count:
            taken = f"the nearest, {removed}, is taken" if removed else "it is left out"
            notes[mode] = f"{BASELINES[mode]}: no plan removes exactly {count} blocks; {taken}"
        if removed or not count:
            plans[mode] = plan_from_runs(analysis.model, runs, mode, candidates)
    return plans, notes


def with_width(
    analysis: Analysis, candidates: Candidates, settings: PlanConfig, budget: str, depth: CompressionPlan
) -> CompressionPlan | None:
    """The optimal plan over depth and smaller modules that is as small, or as fast, as a plan of depth alone.

    Args:
        analysis: The teacher.
        candidates: What the fit stage measured.
        settings: Protected blocks and so on.
        budget: ``keep`` or ``speedup``: what it shares with the other plan, as predicted.
        depth: The other plan.

    Returns:
        The plan; None if no smaller module was measured.

    Raises:
        BudgetError: No such plan is that small or fast.
    """
    if not candidates.width:
        return None
    budgets = {"keep": depth.predicted.param_ratio, "speedup": depth.predicted.speedup}
    same = {"mode": OURS, "keep": None, "speedup": None, "fit_gb": None, budget: budgets[budget]}
    return plan(analysis, candidates, settings.model_copy(update=same))


def removed_outright(plan: CompressionPlan) -> CompressionPlan:
    """The same blocks removed, with the first block of each run left in its place as it is."""

    def changed(segment: Segment) -> Segment:
        return dataclasses.replace(segment, start="first") if segment.is_run else segment

    stacks = {name: tuple(map(changed, pieces)) for name, pieces in plan.stacks.items()}
    return dataclasses.replace(plan, stacks=stacks)


def run_keys(plan: CompressionPlan) -> tuple[RunKey, ...]:
    """The runs of a plan as (stack, first, last)."""
    return tuple((stack, segment.first, segment.last) for stack, segment in plan.runs)


def with_starts(session: Session, plan: CompressionPlan) -> CompressionPlan:
    """Choose the start of every substitute by its state error on held-out states, as the fit stage does."""
    keys, settings = run_keys(plan), session.config.fit
    if not keys:
        return plan
    states = States(session.calibration, "held-out")
    sample = list(states.weighed(states.spread(settings.eval_states), settings.eval_states))
    starts = best_starts(session.transformer, session.adapter, sample, keys, settings.starts)

    def changed(stack: str, segment: Segment) -> Segment:
        start = starts.get((stack, segment.first, segment.last))
        return dataclasses.replace(segment, start=start) if start else segment

    stacks = {name: tuple(changed(name, s) for s in pieces) for name, pieces in plan.stacks.items()}
    return dataclasses.replace(plan, stacks=stacks)
