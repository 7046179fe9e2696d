"""Choose the runs: analysis + candidates + budget -> plan. No torch here.

``optimal``: dynamic programming over non-overlapping candidate runs, least summed squared
velocity error under the budget; where smaller modules were measured also over those
(:mod:`ppcl.pruning.knapsack`). ``paper``: the intervals of eqs. 4-5, in order of least
damage. ``uniform`` and ``influence`` are baselines with the same kind of substitute. ``allocation``
removes no block: it cuts neurons and heads by class (:mod:`ppcl.pruning.allocations`). :mod:`ppcl.pruning.searches` has
these modes and others, which look at the teacher itself, behind one interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.errors import BudgetError
from ppcl.pruning.allocations import allotted_layouts, layout_of
from ppcl.pruning.artifacts import Candidate, Candidates, WidthOption
from ppcl.pruning.knapsack import Layout, best_layouts, best_subsets
from ppcl.student.plan import CompressionPlan, Prediction, Segment
from ppcl.student.prediction import predict
from ppcl.teacher.model_info import ModelInfo, Stack

Runs = tuple[tuple[str, int, int], ...]
UNITS = {"keep": "of the parameters", "speedup": "times as fast", "fit_gb": "GB of weights"}


def plan(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """Choose runs under the budget.

    Args:
        analysis: Gives the paper's intervals and block influence.
        candidates: Runs with their costs.
        settings: Mode, budget and protected blocks.

    Returns:
        The plan with its prediction.

    Raises:
        BudgetError: No plan meets the budget; the message names the nearest feasible one.
    """
    model = analysis.model
    costs = {(c.stack, c.first, c.last): c for c in candidates.candidates}
    allowed = [c for c in candidates.candidates if is_allowed(model, c, settings)]
    allowed_width = [o for o in candidates.width if settings.width is None or o.group.split(".")[0] in settings.width]
    if settings.mode == "optimal" and allowed_width:
        return _plan_with_width(model, allowed_width, allowed, settings)
    if settings.mode == "allocation":
        return _plan_by_allocation(model, allowed_width, settings)
    if settings.mode == "optimal":
        # Fitted and probe costs are on different scales (a probe can beat a briefly fitted block),
        # so unfitted runs come in only where the fitted ones cannot meet the budget.
        ladder = optimal_ladder(model, [c for c in allowed if c.fitted_error is not None])
        if not any(meets(build_prediction(model, runs, costs), *settings.budget) for runs in ladder):
            ladder = optimal_ladder(model, allowed)
    elif settings.mode == "paper":
        ladder = paper_ladder(analysis, costs, settings)
    elif settings.mode == "influence":
        ladder = influence_ladder(analysis, settings)
    else:
        ladder = uniform_ladder(model, settings)
    return from_ladder(model, ladder, costs, settings, by_error=settings.mode == "optimal")


def from_ladder(
    model: ModelInfo,
    ladder: Sequence[Runs],
    costs: Mapping[tuple[str, int, int], Candidate],
    settings: PlanConfig,
    start: str | None = None,
    by_error: bool = False,
) -> CompressionPlan:
    """Of sets of runs take the first that meets the budget.

    Args:
        model: The teacher.
        ladder: Sets of runs, from none removed to many.
        costs: What is known of runs; one that is not there has no known error.
        settings: Mode and budget.
        start: What all substitutes start from; None is the best known start of each.
        by_error: Take the one of least error that meets it.

    Raises:
        BudgetError: None of them meets it; the message names the nearest feasible budget.
    """
    kind, value = settings.budget
    found = [(runs, build_prediction(model, runs, costs, start)) for runs in ladder]
    fitting = [(runs, prediction) for runs, prediction in found if meets(prediction, kind, value)]
    if not fitting:
        raise BudgetError(infeasible([prediction for _, prediction in found], kind, value, settings))
    chosen, prediction = min(fitting, key=lambda pair: _rank(pair[1], by_error))
    stacks = {s.name: segments(s, [r for r in chosen if r[0] == s.name], costs, start) for s in model.stacks}
    return CompressionPlan(model, settings.mode, {kind: value}, stacks, prediction)


def _plan_with_width(
    model: ModelInfo, options: Sequence[WidthOption], allowed: Sequence[Candidate], settings: PlanConfig
) -> CompressionPlan:
    """Depth and width together, by :mod:`ppcl.pruning.knapsack`."""
    kind, value = settings.budget
    predictions: list[tuple[Layout, Prediction]] = []
    for runs in ([c for c in allowed if c.fitted_error is not None], list(allowed)):
        costed = [(c, cost_of(c)) for c in runs if math.isfinite(cost_of(c))]
        predictions = [
            (layout, predict(model, layout, math.sqrt(cost)))
            for layout, cost in best_layouts(model, costed, options, by_flops=kind == "speedup")
        ]
        fitting = [(p.error or 0.0, -p.params, i) for i, (_, p) in enumerate(predictions) if meets(p, kind, value)]
        if fitting:
            layout, prediction = predictions[min(fitting)[-1]]
            return CompressionPlan(model, settings.mode, {kind: value}, layout, prediction)
    raise BudgetError(infeasible([p for _, p in predictions], kind, value, settings))


def _plan_by_allocation(model: ModelInfo, options: Sequence[WidthOption], settings: PlanConfig) -> CompressionPlan:
    """Fewer neurons and heads alone, by :mod:`ppcl.pruning.allocations`; the smallest cut that meets the budget."""
    kind, value = settings.budget
    ladder = allotted_layouts(model, options, settings.allocation, settings.gamma)
    if not ladder:
        raise BudgetError(
            "plan.mode=allocation cuts neurons and heads, and none were measured; add ffn or attention to fit.width "
            "(and plan.width, if it is set) and fit again"
        )
    found = [layout_of(model, chosen) for chosen in ladder]
    predictions = [predict(model, layout, math.sqrt(cost)) for layout, cost in found]
    fitting = [(-p.params, i) for i, p in enumerate(predictions) if meets(p, kind, value)]
    if not fitting:
        raise BudgetError(infeasible(predictions, kind, value, settings))
    index = min(fitting)[-1]
    return CompressionPlan(model, settings.mode, {kind: value}, found[index][0], predictions[index])


def select(plan: CompressionPlan, kind: str, value: float) -> CompressionPlan:
    """Choose, of a plan's substitutes, those that meet another budget; the teacher's blocks stay in the others.

    Args:
        plan: A plan whose substitutes are trained.
        kind: ``keep``, ``speedup`` or ``fit_gb``.
        value: The budget.

    Raises:
        BudgetError: Even all of them do not meet it.
    """
    found = [
        (layout, predict(plan.model, layout, math.sqrt(cost)))
        for layout, cost in best_subsets(plan.model, plan.stacks, by_flops=kind == "speedup")
    ]
    fitting = [(p.error or 0.0, -p.params, i) for i, (_, p) in enumerate(found) if meets(p, kind, value)]
    if not fitting:
        nearest = _nearest([p for _, p in found], kind)
        raise BudgetError(
            f"the substitutes of this bundle do not give {value:g} {UNITS[kind]}; all of them put in it is {nearest}"
        )
    layout, prediction = found[min(fitting)[-1]]
    return CompressionPlan(plan.model, plan.mode, {kind: value}, layout, prediction)


def is_allowed(model: ModelInfo, candidate: Candidate, settings: PlanConfig) -> bool:
    """Whether a run leaves the protected first and last blocks alone."""
    return is_allowed_segment(model, candidate.stack, candidate.first, candidate.last, settings)


def is_allowed_segment(model: ModelInfo, stack: str, first: int, last: int, settings: PlanConfig) -> bool:
    """Whether blocks first..last of a stack leave the protected first and last blocks alone."""
    front, end = model.stacks[0], model.stacks[-1]
    if stack == front.name and first < settings.protect_first:
        return False
    return not (stack == end.name and last >= end.num_blocks - settings.protect_last)


def cost_of(candidate: Candidate | None) -> float:
    """Squared velocity error of a run: fitted where it was fitted, by probes otherwise."""
    if candidate is None:
        return math.inf
    error = candidate.fitted_error if candidate.fitted_error is not None else candidate.probe_error
    return error**2


def optimal_ladder(model: ModelInfo, candidates: Sequence[Candidate]) -> list[Runs]:
    """Best set of runs for every reachable number of removed blocks of every stack.

    Dynamic programming over positions: state = blocks removed so far in each stack, value =
    least cost and its runs. Squares of errors add (docs/decisions.md), so the parts are independent.
    """
    frontier: dict[tuple[int, ...], tuple[float, Runs]] = {(): (0.0, ())}
    for stack in model.stacks:
        own = [c for c in candidates if c.stack == stack.name and math.isfinite(cost_of(c))]
        table = _stack_table(stack, own)
        joined: dict[tuple[int, ...], tuple[float, Runs]] = {}
        for removed, (cost, runs) in frontier.items():
            for count, (extra, more) in table.items():
                joined[(*removed, count)] = (cost + extra, (*runs, *more))
        frontier = joined
    return [runs for _, runs in frontier.values()]


def _stack_table(stack: Stack, candidates: Sequence[Candidate]) -> dict[int, tuple[float, Runs]]:
    """Least cost and runs of one stack for each number of removed blocks."""
    by_end: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_end.setdefault(candidate.last + 1, []).append(candidate)
    best: list[dict[int, tuple[float, Runs]]] = [{0: (0.0, ())}]
    for position in range(1, stack.num_blocks + 1):
        row = dict(best[position - 1])
        for candidate in by_end.get(position, ()):
            run = (candidate.stack, candidate.first, candidate.last)
            for removed, (cost, runs) in best[candidate.first].items():
                option = (cost + cost_of(candidate), (*runs, run))
                count = removed + candidate.removed
                if count not in row or option[0] < row[count][0]:
                    row[count] = option
        best.append(row)
    return best[-1]


def paper_ladder(
    analysis: Analysis, costs: Mapping[tuple[str, int, int], Candidate], settings: PlanConfig
) -> list[Runs]:
    """The paper's intervals, added one after another in order of least damage."""
    intervals = []
    for found in analysis.stacks:
        stack = next(s for s in analysis.model.stacks if s.name == found.name)
        for first, last in found.intervals:
            low = max(first, settings.protect_first if stack is analysis.model.stacks[0] else 0)
            end = stack.num_blocks - (settings.protect_last if stack is analysis.model.stacks[-1] else 0)
            high = min(last, end - 1)
            if high > low:
                intervals.append((found.name, low, high))
    damage: Callable[[tuple[str, int, int]], float] = lambda run: cost_of(costs.get(run))  # noqa: E731
    ordered = sorted(intervals, key=lambda run: (damage(run), run))
    return [tuple(sorted(ordered[:count])) for count in range(len(ordered) + 1)]


def uniform_ladder(model: ModelInfo, settings: PlanConfig) -> list[Runs]:
    """Pairs spread evenly over all blocks, then triples and so on: for each number of removed blocks."""
    ladder: list[Runs] = [()]
    free = [free_blocks(model, stack, settings) for stack in model.stacks]
    limits = [max(0, high - low - 1) for low, high in free]  # one block of each stack stays
    for removed in range(1, sum(limits) + 1):
        runs: list[tuple[str, int, int]] = []
        for stack, (low, high), count in zip(model.stacks, free, shares(removed, limits), strict=True):
            runs += even_runs(stack.name, low, high, count)
        ladder.append(tuple(runs))
    return ladder


def shares(total: int, limits: Sequence[int]) -> list[int]:
    """Split ``total`` in proportion to ``limits``; the largest remainders take what rounding leaves."""
    exact = [total * limit / sum(limits) for limit in limits]
    found = [math.floor(value) for value in exact]
    order = sorted(range(len(limits)), key=lambda i: found[i] - exact[i])
    for index in order[: total - sum(found)]:
        found[index] += 1
    return found


def free_blocks(model: ModelInfo, stack: Stack, settings: PlanConfig) -> tuple[int, int]:
    """Unprotected blocks low <= i < high of a stack."""
    low = settings.protect_first if stack is model.stacks[0] else 0
    return low, stack.num_blocks - (settings.protect_last if stack is model.stacks[-1] else 0)


def even_runs(name: str, low: int, high: int, removed: int) -> list[tuple[str, int, int]]:
    """Split low..high into ``size - removed`` groups whose sizes differ by at most one, evenly mixed."""
    groups = (high - low) - removed
    if groups < 1 or removed < 1:
        return []
    edges = [low + round(i * (high - low) / groups) for i in range(groups + 1)]
    return [(name, a, b - 1) for a, b in pairwise(edges) if b - a > 1]


def influence_ladder(analysis: Analysis, settings: PlanConfig) -> list[Runs]:
    """Remove the blocks of least influence (ShortGPT), each merged into the kept block before it."""
    scored = []
    for found in analysis.stacks:
        stack = next(s for s in analysis.model.stacks if s.name == found.name)
        low, high = free_blocks(analysis.model, stack, settings)
        scored += [(found.influence[i], found.name, i) for i in range(max(1, low + 1), high)]
    return removal_ladder([(name, index) for _, name, index in sorted(scored)])


def removal_ladder(order: Sequence[tuple[str, int]]) -> list[Runs]:
    """Remove (stack, block) in this order, each merged into the kept block before it; no first block of a stack."""
    ladder: list[Runs] = []
    for count in range(len(order) + 1):
        runs: list[tuple[str, int, int]] = []
        for name, index in sorted(order[:count]):
            if runs and runs[-1][0] == name and runs[-1][2] == index - 1:
                runs[-1] = (name, runs[-1][1], index)
            else:
                runs.append((name, index - 1, index))
        ladder.append(tuple(runs))
    return ladder


def segments(
    stack: Stack,
    runs: Sequence[tuple[str, int, int]],
    costs: Mapping[tuple[str, int, int], Candidate],
    start: str | None = None,
) -> tuple[Segment, ...]:
    """Turn runs of one stack into its segments; the start of a substitute is the given or the best known one."""
    pieces, position = [], 0
    for name, first, last in sorted(runs):
        pieces += [Segment(i, i) for i in range(position, first)]
        known = costs.get((name, first, last))
        error = math.sqrt(cost_of(known)) if known else None
        pieces.append(Segment(first, last, start or (known.start if known else None) or "middle", error=error))
        position = last + 1
    return (*pieces, *(Segment(i, i) for i in range(position, stack.num_blocks)))


def build_prediction(
    model: ModelInfo, runs: Runs, costs: Mapping[tuple[str, int, int], Candidate], start: str | None = None
) -> Prediction:
    """Predict a set of runs, whose substitutes have the given or the best known start."""
    squares = [cost_of(costs.get(run)) for run in runs]
    error = math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else None
    stacks = {s.name: segments(s, [r for r in runs if r[0] == s.name], costs, start) for s in model.stacks}
    return predict(model, stacks, error)


def meets(prediction: Prediction, kind: str, value: float) -> bool:
    """Whether a prediction is within the budget."""
    if kind == "keep":
        return prediction.param_ratio <= value + 1e-9
    if kind == "speedup":
        return prediction.speedup >= value - 1e-9
    return prediction.bytes <= value * 1e9


def _rank(prediction: Prediction, by_error: bool) -> tuple[float, float]:
    """Order of preference: least error, or the first rung that fits."""
    error = prediction.error if by_error and prediction.error is not None else 0.0
    return (error, -prediction.params)


def _nearest(predictions: Sequence[Prediction], kind: str) -> str:
    """The option that asks for the most that any of the predictions gives."""
    if kind == "keep":
        return f"--keep {math.ceil(min(p.param_ratio for p in predictions) * 1000) / 1000}"
    if kind == "speedup":
        return f"--speedup {math.floor(max(p.speedup for p in predictions) * 100) / 100}"
    least = min(p.bytes for p in predictions)
    return f"--fit {math.ceil(least / 1e8) / 10}GB" if least > 1e9 else f"--fit {math.ceil(least / 1e4) / 100}MB"


def infeasible(predictions: Sequence[Prediction], kind: str, value: float, settings: PlanConfig) -> str:
    """What to say where no plan of a mode meets the budget, with the nearest that one does."""
    by_width = settings.mode == "allocation"
    remedy = "smaller fit.width_shares" if by_width else "longer runs with --set fit.max_run"
    return (
        f"no {settings.mode} plan gives {value:g} {UNITS[kind]}; the nearest feasible budget is "
        f"{_nearest(predictions, kind)} ({remedy} reach further)"
    )
