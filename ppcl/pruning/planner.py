"""Choose the runs: analysis + candidates + budget -> plan. No torch here.

A :class:`Planned` search looks at measured costs alone; those that look at the teacher itself are in
:mod:`ppcl.pruning.searches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import ClassVar, Protocol

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.config.extensions import SEARCHES
from ppcl.errors import BudgetError, ConfigError
from ppcl.modules.parts import one_share
from ppcl.pruning import allocations
from ppcl.pruning.allocations import allotted_layouts
from ppcl.pruning.artifacts import Candidate, Candidates, WidthOption
from ppcl.pruning.exchanges import JointErrors
from ppcl.pruning.knapsack import (
    CLASSES,
    DEPTH_CLASSES,
    Edge,
    Layout,
    Vectors,
    best_layouts,
    best_routes,
    edges_of,
    edges_of_plan,
    layout_of,
    one_width,
    put_in,
)
from ppcl.student.plan import CompressionPlan, Prediction, Segment, free_blocks
from ppcl.student.prediction import predict
from ppcl.teacher.model_info import ModelInfo, Stack

RunKey = tuple[str, int, int]  # stack, first block, last block
Runs = tuple[RunKey, ...]
Costs = Mapping[RunKey, Candidate]
OTHERS = 3  # times as many plans are looked at as are wanted beside the best
UNITS = {"keep": "of the parameters", "speedup": "times as fast", "fit_gb": "GB of weights"}


class Measured(Protocol):
    """The part of a search's context that planners read (:class:`ppcl.pruning.searches.base.Context`)."""

    @property
    def analysis(self) -> Analysis:
        """Gives the paper's intervals and block influence."""
        ...

    @property
    def candidates(self) -> Candidates:
        """Runs and smaller modules with their costs."""
        ...

    @property
    def settings(self) -> PlanConfig:
        """Budget and protected blocks."""
        ...


@dataclass(frozen=True)
class Planned:
    """A search that looks at nothing but what was measured before; made from a function."""

    rule: Callable[[Analysis, Candidates, PlanConfig], CompressionPlan]
    deterministic: ClassVar[bool] = True

    def cost(self, context: Measured) -> float:
        """Nothing."""
        return 0

    def choose(self, context: Measured) -> CompressionPlan:
        """Apply the rule."""
        return self.rule(context.analysis, context.candidates, context.settings)


def plan(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """Choose runs under the budget, by the planned search that ``settings.mode`` names.

    Args:
        analysis: Gives the paper's intervals and block influence.
        candidates: Runs with their costs.
        settings: Mode, budget and protected blocks.

    Returns:
        The plan with its prediction.

    Raises:
        BudgetError: No plan meets the budget; the message names the nearest feasible one.
    """
    search: Planned = SEARCHES[settings.mode]
    return search.rule(analysis, candidates, settings)


@Planned
def optimal(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """Least velocity error of all together, over runs that do not overlap and smaller modules.

    Fitted and probe costs are on different scales (a probe can beat a briefly fitted block), so unfitted runs come in
    only where the fitted ones cannot meet the budget. With ``plan.uniform_width`` all networks have one width: the best
    plan of each that was measured is made, the teacher's own among them, and the best of those taken.
    """
    return best_plans(analysis, candidates, settings, 1)[0]


def best_plans(analysis: Analysis, candidates: Candidates, settings: PlanConfig, count: int) -> list[CompressionPlan]:
    """Plans of least joint error: the best one, and those without one of the things that cost it most.

    Args:
        analysis: Of the teacher.
        candidates: Runs and smaller modules with their costs.
        settings: Budget, and what may be used.
        count: How many plans, at most.

    Returns:
        Different plans, the best first.

    Raises:
        BudgetError: None meets the budget.
    """
    cheapest = partial(_cheapest, analysis.model, candidates, settings)
    runs, _ = usable(analysis.model, candidates, settings)
    try:
        usable_runs = [run for run in runs if run.fitted_error is not None]
        found = [(cheapest(usable_runs), frozenset[RunKey]())]
    except BudgetError:
        usable_runs = runs
        found = [(cheapest(usable_runs), frozenset())]
    for plan, without in found if count > 1 else []:  # it grows on the way
        pieces = [(name, s) for name, segments in plan.stacks.items() for s in segments if s.is_substitute]
        for name, piece in sorted(pieces, key=lambda each: -(each[1].error or 0)):
            out = without | {(name, piece.first, piece.last)}
            if len(found) < OTHERS * count and all(out != other for _, other in found):
                with suppress(BudgetError):
                    found.append((cheapest(usable_runs, out), out))
    plans: list[CompressionPlan] = []
    for plan, _ in sorted(found, key=lambda each: each[0].predicted.error or 0):
        plans += [plan] if all(plan.stacks != other.stacks for other in plans) else []
    return plans[:count]


def _cheapest(
    model: ModelInfo,
    candidates: Candidates,
    settings: PlanConfig,
    runs: Sequence[Candidate],
    without: Collection[RunKey] = (),
) -> CompressionPlan:
    """The plan of least joint error of some runs, which leaves alone what stands in some places."""
    by_flops, (_, options) = settings.budget[0] == "speedup", usable(model, candidates, settings)
    beside = () if settings.uniform_width else options
    ways: list[tuple[list[Edge], list[Edge]]] = [([], edges_of(model, runs, beside, by_flops, candidates.vectors))]
    for of_one in widths(model, options) if settings.uniform_width else ():
        ways.append(one_width(model, runs, of_one, by_flops, candidates.vectors))
    classes, layouts = CLASSES if beside else DEPTH_CLASSES, []
    for base, every in ways:
        edges = [edge for edge in every if edge.place not in without]
        try:
            layouts += [least_layout(model, edges, settings.budget, classes, partial(infeasible, settings), base)]
        except BudgetError as error:
            refusal = error
    if not layouts:
        raise refusal  # of the narrowest
    layout, found = min(layouts, key=lambda pair: (math.inf if (e := pair[1].error) is None else e, -pair[1].params))
    return CompressionPlan(model, settings.mode, dict([settings.budget]), layout, found)


@Planned
def paper(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """The intervals of eqs. 4-5, in order of least damage a removed block."""
    ladder = paper_ladder(analysis, costs_of(candidates), settings)
    return from_ladder(analysis.model, ladder, candidates, settings)


@Planned
def uniform(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """Runs of equal length, evenly spread: a baseline with the same kind of substitute."""
    return from_ladder(analysis.model, uniform_ladder(analysis.model, settings), candidates, settings)


@Planned
def influence(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """Blocks of least influence go first: a baseline with the same kind of substitute."""
    return from_ladder(analysis.model, influence_ladder(analysis, settings), candidates, settings)


@Planned
def allocation(analysis: Analysis, candidates: Candidates, settings: PlanConfig) -> CompressionPlan:
    """Fewer neurons and heads alone, by :mod:`ppcl.pruning.allocations`; the smallest cut that meets the budget."""
    _, options = usable(analysis.model, candidates, settings)
    ladder = allotted_layouts(analysis.model, options, settings.allocation, settings.gamma)
    if not ladder:
        raise BudgetError(
            "plan.mode=allocation cuts neurons and heads, and none were measured; add ffn or attention to fit.width "
            "(and plan.width, if it is set) and fit again"
        )
    layouts = [allocations.layout_of(analysis.model, choice, candidates.vectors) for choice in ladder]
    return plan_of(analysis.model, layouts, settings)


def widths(model: ModelInfo, options: Sequence[WidthOption]) -> list[list[WidthOption]]:
    """For each share of neurons that all networks of all blocks were measured at, the options that keep it.

    The widest comes first.
    """
    by_share: dict[Fraction, list[WidthOption]] = {}
    for option in options:
        share = one_share(option.parts)
        if share is not None:
            by_share.setdefault(share, []).append(option)
    networks = {(option.stack, option.block, option.slot) for members in by_share.values() for option in members}
    if {place[:2] for place in networks} != {(s.name, index) for s in model.stacks for index in range(s.num_blocks)}:
        return []
    return [m for _, m in sorted(by_share.items(), reverse=True) if {(o.stack, o.block, o.slot) for o in m} == networks]


def usable(model: ModelInfo, candidates: Candidates, settings: PlanConfig) -> tuple[list[Candidate], list[WidthOption]]:
    """Runs that leave the protected blocks alone, and smaller modules of the groups that the settings allow."""
    runs = [run for run in candidates.candidates if is_allowed(model, run, settings)]
    return runs, [
        o for o in candidates.width if settings.width is None or set(o.family.split("+")) <= set(settings.width)
    ]


def costs_of(candidates: Candidates) -> dict[RunKey, Candidate]:
    """What is known of each run."""
    return {(run.stack, run.first, run.last): run for run in candidates.candidates}


def from_ladder(
    model: ModelInfo, ladder: Sequence[Runs], candidates: Candidates, settings: PlanConfig, start: str | None = None
) -> CompressionPlan:
    """Of sets of runs take the first that meets the budget.

    Args:
        model: The teacher.
        ladder: Sets of runs, from none removed to many.
        candidates: What is known of runs; one that is not there has no known error.
        settings: Mode and budget.
        start: What all substitutes start from; None is the best known start of each.

    Raises:
        BudgetError: None of them meets it; the message names the nearest feasible budget.
    """
    return plan_of(model, [layout_of_runs(model, runs, candidates, start) for runs in ladder], settings)


def plan_of(model: ModelInfo, layouts: Sequence[Layout], settings: PlanConfig) -> CompressionPlan:
    """Of layouts take the largest that meets the budget.

    Raises:
        BudgetError: None meets it; the message names the nearest feasible budget.
    """
    enough = _within_budget(model, layouts, settings.budget, partial(infeasible, settings))
    best = min(enough, key=lambda number: -enough[number].params)
    return CompressionPlan(model, settings.mode, dict([settings.budget]), layouts[best], enough[best])


def _within_budget(
    model: ModelInfo,
    layouts: Sequence[Layout],
    budget: tuple[str, float],
    refuse: Callable[[str], str],
) -> dict[int, Prediction]:
    """What is predicted of the layouts that meet a budget, by their numbers.

    Raises:
        BudgetError: None meets it.
    """
    predictions = [predict(model, layout) for layout in layouts]
    enough = {number: found for number, found in enumerate(predictions) if meets(found, *budget)}
    if not enough:
        raise BudgetError(refuse(nearest_budget(predictions, budget[0])))
    return enough


def least_layout(
    model: ModelInfo,
    edges: Sequence[Edge],
    budget: tuple[str, float],
    classes: int,
    refuse: Callable[[str], str],
    base: Sequence[Edge] = (),
) -> tuple[Layout, Prediction]:
    """Of everything that meets a budget find what has the least joint error, about, and of equals the largest.

    The cheapest paths by summed squared errors are the start; of those that meet the budget the one of least joint
    error is improved by exchanges (:mod:`ppcl.pruning.exchanges`).

    Args:
        model: The teacher.
        edges: What may stand in the place of its blocks.
        budget: Kind and value.
        classes: How many classes of savings are told apart.
        refuse: The message, from the nearest budget that is met.
        base: What stands between the edges, from which they are counted; the teacher's blocks if empty.

    Raises:
        BudgetError: Nothing meets it.
    """
    joint = JointErrors(edges)
    routes = best_routes(model, edges, budget[0] == "speedup", classes)
    layouts = [layout_of(model, [edges[n] for n in route], base) for route in routes]
    enough = _within_budget(model, layouts, budget, refuse)
    wanted = min(sum(edges[n].saved for n in routes[number]) for number in enough)
    start = min(enough, key=lambda number: (joint.of(routes[number]), -enough[number].params))
    best = layout_of(model, [edges[n] for n in joint.improved(routes[start], wanted)], base)
    found = predict(model, best)
    if meets(found, *budget):
        return best, found
    return layouts[start], enough[start]  # what edges save is rounded otherwise than what a plan is predicted to


def select(plan: CompressionPlan, kind: str, value: float) -> CompressionPlan:
    """Choose, of a plan's substitutes, those of least joint error that meet another budget.

    The teacher's blocks stay in the place of the others.

    Args:
        plan: A plan whose substitutes are trained.
        kind: ``keep``, ``speedup`` or ``fit_gb``.
        value: The budget.

    Raises:
        BudgetError: Even all of them do not meet it.
    """
    model = plan.model

    def refuse(nearest: str) -> str:
        return f"the substitutes of this bundle do not give {value:g} {UNITS[kind]}; all of them put in it is {nearest}"

    edges = edges_of_plan(model, plan.stacks, kind == "speedup")
    layout, found = least_layout(model, edges, (kind, value), CLASSES, refuse)
    return CompressionPlan(model, plan.mode, {kind: value}, layout, found)


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
    return math.inf if candidate is None else candidate.cost


def optimal_ladder(model: ModelInfo, candidates: Sequence[Candidate]) -> list[Runs]:
    """Best set of runs for every amount of parameters that some of these runs save."""
    layouts = best_layouts(model, edges_of(model, candidates, (), False), False, DEPTH_CLASSES)
    return [
        tuple((name, s.first, s.last) for name, segments in layout.items() for s in segments if s.is_run)
        for layout in layouts
    ]


def paper_ladder(analysis: Analysis, costs: Costs, settings: PlanConfig) -> list[Runs]:
    """The paper's intervals, added one after another in order of least damage for each block that they remove.

    Raises:
        ConfigError: The intervals were found with other protected blocks.
    """
    intervals = [(stack.name, *interval) for stack in analysis.stacks for interval in stack.intervals]
    for name, first, last in intervals:
        if not is_allowed_segment(analysis.model, name, first, last, settings):
            raise ConfigError(
                f"the paper's interval {name} {first}-{last} takes a block that plan.protect_first="
                f"{settings.protect_first} and plan.protect_last={settings.protect_last} keep; intervals are found "
                "among unprotected blocks, so run ppcl analyze again with these settings"
            )
    ordered = sorted(intervals, key=lambda run: (cost_of(costs.get(run)) / (run[2] - run[1]), run))
    return [tuple(sorted(ordered[:count])) for count in range(len(ordered) + 1)]


def uniform_ladder(model: ModelInfo, settings: PlanConfig) -> list[Runs]:
    """Pairs spread evenly over all blocks, then triples and so on: for each number of removed blocks."""
    ladder: list[Runs] = [()]
    free = [free_blocks(model, stack, settings) for stack in model.stacks]
    limits = [max(0, high - low - 1) for low, high in free]  # one block of each stack stays
    for removed in range(1, sum(limits) + 1):
        runs: list[RunKey] = []
        for stack, (low, high), count in zip(model.stacks, free, shares(removed, limits), strict=True):
            runs += even_runs(stack.name, low, high, count)
        ladder.append(tuple(runs))
    return ladder


def shares(total: int, limits: Sequence[int]) -> list[int]:
    """Split ``total`` in proportion to ``limits``; the largest remainders take what rounding leaves."""
    exact = [total * limit / sum(limits) for limit in limits]
    rounded = [math.floor(value) for value in exact]
    order = sorted(range(len(limits)), key=lambda i: rounded[i] - exact[i])
    for index in order[: total - sum(rounded)]:
        rounded[index] += 1
    return rounded


def even_runs(name: str, low: int, high: int, removed: int) -> list[RunKey]:
    """Split low..high into ``size - removed`` groups whose sizes differ by at most one, evenly mixed."""
    groups = (high - low) - removed
    if groups < 1 or removed < 1:
        return []
    edges = [low + round(i * (high - low) / groups) for i in range(groups + 1)]
    return [(name, a, b - 1) for a, b in pairwise(edges) if b - a > 1]


def influence_ladder(analysis: Analysis, settings: PlanConfig) -> list[Runs]:
    """Remove the blocks of least influence (ShortGPT), each merged into the kept block before it."""
    scored = []
    for measured in analysis.stacks:
        stack = next(s for s in analysis.model.stacks if s.name == measured.name)
        low, high = free_blocks(analysis.model, stack, settings)
        scored += [(measured.influence[i], stack.name, i) for i in range(max(1, low + 1), high)]
    return removal_ladder([(name, index) for _, name, index in sorted(scored)])


def removal_ladder(order: Sequence[tuple[str, int]]) -> list[Runs]:
    """Remove (stack, block) in this order, each merged into the kept block before it; no first block of a stack."""
    ladder: list[Runs] = []
    for count in range(len(order) + 1):
        runs: list[RunKey] = []
        for name, index in sorted(order[:count]):
            if runs and runs[-1][0] == name and runs[-1][2] == index - 1:
                runs[-1] = (name, runs[-1][1], index)
            else:
                runs.append((name, index - 1, index))
        ladder.append(tuple(runs))
    return ladder


def segments(
    stack: Stack, runs: Sequence[RunKey], costs: Costs, start: str | None = None, vectors: Vectors | None = None
) -> tuple[Segment, ...]:
    """Turn runs of one stack into its segments; the start of a substitute is the given or the best known one."""
    pieces, position = [], 0
    for name, first, last in sorted(runs):
        pieces += [Segment(i, i) for i in range(position, first)]
        run = costs.get((name, first, last))
        known = run if math.isfinite(cost_of(run)) else None
        segment = Segment(first, last, start or (run.start if run else None) or "middle")
        pieces.append(put_in(segment, known, (), vectors)[0])
        position = last + 1
    return (*pieces, *(Segment(i, i) for i in range(position, stack.num_blocks)))


def layout_of_runs(model: ModelInfo, runs: Runs, candidates: Candidates, start: str | None = None) -> Layout:
    """Segments of a set of runs, whose substitutes have the given or the best known start."""
    costs, vectors = costs_of(candidates), candidates.vectors
    return {s.name: segments(s, [r for r in runs if r[0] == s.name], costs, start, vectors) for s in model.stacks}


def meets(prediction: Prediction, kind: str, value: float) -> bool:
    """Whether a prediction is within the budget."""
    if kind == "keep":
        return prediction.param_ratio <= value + 1e-9
    if kind == "speedup":
        return prediction.speedup >= value - 1e-9
    return prediction.bytes <= value * 1e9


def nearest_budget(predictions: Sequence[Prediction], kind: str) -> str:
    """The option that asks for the most that any of the predictions gives."""
    if kind == "keep":
        return f"--keep {math.ceil(min(p.param_ratio for p in predictions) * 1000) / 1000}"
    if kind == "speedup":
        return f"--speedup {math.floor(max(p.speedup for p in predictions) * 100) / 100}"
    least = min(p.bytes for p in predictions)
    return f"--fit {math.ceil(least / 1e8) / 10}GB" if least > 1e9 else f"--fit {math.ceil(least / 1e4) / 100}MB"


def infeasible(settings: PlanConfig, nearest: str) -> str:
    """What to say where no plan of a mode meets the budget, with the nearest that one does."""
    kind, value = settings.budget
    by_width = settings.mode == "allocation"
    remedy = "smaller fit.width_shares" if by_width else "longer runs with --set fit.max_run"
    return (
        f"no {settings.mode} plan gives {value:g} {UNITS[kind]}; the nearest feasible budget is "
        f"{nearest} ({remedy} reach further)"
    )
