"""The planner against brute force, and its promises."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import DUAL, SINGLE, describe_alone, random_substitutes, tiny_flux, tiny_qwen

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.config import PlanConfig
from ppcl.errors import BudgetError, ConfigError
from ppcl.pruning import planner
from ppcl.pruning.artifacts import Candidate, Candidates
from ppcl.student.bundle import Bundle, build_student
from ppcl.student.plan import CompressionPlan
from ppcl.student.prediction import bounded, predict, unbounded
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.model_info import ModelInfo, Stack

Run = tuple[str, int, int]
MODEL = ModelInfo(
    transformer_class="Tiny",
    config_digest="0",
    params=6 * 1_000_000 + 5 * 700_000 + 300_000,
    flops=6 * 40 + 5 * 90 + 10,
    bytes_per_param=4,
    other_bytes=50_000_000,
    stacks=(
        Stack("a", "num_a", 6, (1_000_000,) * 6, (40,) * 6),
        Stack("b", "num_b", 5, (700_000,) * 5, (90,) * 5),
    ),
)


def analysis_of(model: ModelInfo, intervals: dict[str, list[tuple[int, int]]], seed: int = 0) -> Analysis:
    generator = random.Random(seed)
    stacks = []
    for stack in model.stacks:
        size = stack.num_blocks
        cka = tuple(tuple(1.0 if k >= u else None for k in range(size)) for u in range(size))
        influence = tuple(generator.random() for _ in range(size))
        stacks.append(StackAnalysis(stack.name, cka, {}, tuple(intervals.get(stack.name, ())), {}, {}, influence))
    return Analysis(model, tuple(stacks), 1, {}, 0.0)


def random_candidates(model: ModelInfo, seed: int, longest: int = 4) -> Candidates:
    generator = random.Random(seed)
    found = [
        Candidate(
            stack.name,
            first,
            last,
            generator.random() * (last - first),
            "middle",
            generator.random() * (last - first) if generator.random() < 0.5 else None,
        )
        for stack in model.stacks
        for first in range(stack.num_blocks)
        for last in range(first + 1, min(first + longest, stack.num_blocks))
    ]
    return Candidates(tuple(found), 0, 0.0)


def all_sets(candidates: list[Candidate]) -> Iterator[list[Candidate]]:
    """Every set of runs that do not overlap."""
    if not candidates:
        yield []
        return
    head, rest = candidates[0], candidates[1:]
    yield from all_sets(rest)
    apart = [c for c in rest if c.stack != head.stack or c.first > head.last or c.last < head.first]
    for others in all_sets(apart):
        yield [head, *others]


def adding(candidate: Candidate) -> float:
    return float(unbounded(np.array(square(candidate))))


def square(candidate: Candidate) -> float:
    return (candidate.probe_error if candidate.fitted_error is None else candidate.fitted_error) ** 2


def within(runs: list[Candidate], budget: dict[str, float]) -> bool:
    """Whether a set of runs meets a budget, from the model's numbers alone."""
    params = MODEL.params - sum(c.removed * (1_000_000 if c.stack == "a" else 700_000) for c in runs)
    flops = MODEL.flops - sum(c.removed * (40 if c.stack == "a" else 90) for c in runs)
    ((kind, value),) = budget.items()
    measured = {
        "keep": -params / MODEL.params,
        "speedup": MODEL.flops / flops,
        "fit_gb": -(params * 4 + MODEL.other_bytes) / 1e9,
    }[kind]
    return measured >= (value if kind == "speedup" else -value) - 1e-12


def chosen_runs(plan: CompressionPlan) -> set[Run]:
    return {(name, s.first, s.last) for name, s in plan.runs}


@pytest.mark.parametrize(
    "budget",
    [
        {"keep": 0.9},
        {"keep": 0.7},
        {"keep": 0.55},
        {"speedup": 1.3},
        {"speedup": 1.8},
        {"fit_gb": 0.08},
        {"fit_gb": 0.073},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_optimal_is_the_best_of_all_sets(budget: dict[str, float], seed: int) -> None:
    candidates = random_candidates(MODEL, seed)
    settings = PlanConfig(protect_first=0, protect_last=0, **budget)
    found = planner.plan(analysis_of(MODEL, {}), candidates, settings)
    fitted = [c for c in candidates.candidates if c.fitted_error is not None]
    feasible = [runs for runs in all_sets(fitted) if within(runs, budget)]
    # unfitted runs, whose costs are on another scale, come in only where the fitted ones cannot meet the budget
    feasible = feasible or [runs for runs in all_sets(list(candidates.candidates)) if within(runs, budget)]
    best = min(sum(map(adding, runs)) for runs in feasible)
    by_key = {(c.stack, c.first, c.last): c for c in candidates.candidates}
    mine = [by_key[run] for run in chosen_runs(found)]
    assert within(mine, budget)
    assert sum(map(adding, mine)) == pytest.approx(best, rel=1e-12)
    assert found.predicted.error == pytest.approx(math.sqrt(bounded(np.array(best))), rel=1e-12)


def test_the_best_plans_are_different_and_the_best_comes_first() -> None:
    candidates, settings = random_candidates(MODEL, 0), PlanConfig(protect_first=0, protect_last=0, keep=0.8)
    plans = planner.best_plans(analysis_of(MODEL, {}), candidates, settings, 5)
    assert len({frozenset(chosen_runs(plan)) for plan in plans}) == len(plans) == 5
    errors = [plan.predicted.error or 0 for plan in plans]
    assert errors == sorted(errors)
    assert all(plan.predicted.param_ratio <= 0.8 for plan in plans)
    fitted = [c for c in candidates.candidates if c.fitted_error is not None]
    feasible = sorted(sum(map(adding, runs)) for runs in all_sets(fitted) if within(runs, {"keep": 0.8}))
    assert errors[0] == pytest.approx(math.sqrt(bounded(np.array(feasible[0]))))
    assert errors[0] == planner.plan(analysis_of(MODEL, {}), candidates, settings).predicted.error
    two = candidates.candidates[:2]  # where there are not so many
    few = planner.best_plans(
        analysis_of(MODEL, {}), replace(candidates, candidates=two), settings.model_copy(update={"keep": 0.99}), 5
    )
    assert 1 <= len(few) <= 3


def test_unfitted_runs_come_in_only_when_needed() -> None:
    cheap = Candidate("a", 1, 2, 1e-6)
    dear = Candidate("a", 3, 4, 0.8, "middle", 0.5)
    candidates = Candidates((cheap, dear), 0, 0.0)
    one = planner.plan(analysis_of(MODEL, {}), candidates, PlanConfig(keep=0.95))
    assert chosen_runs(one) == {("a", 3, 4)}
    two = planner.plan(analysis_of(MODEL, {}), candidates, PlanConfig(keep=0.85))
    assert chosen_runs(two) == {("a", 1, 2), ("a", 3, 4)}


def test_fitted_errors_come_before_probe_errors() -> None:
    candidates = Candidates((Candidate("a", 1, 2, 0.1, "mean", 0.9), Candidate("a", 3, 4, 0.8, "last", 0.2)), 0, 0.0)
    found = planner.plan(analysis_of(MODEL, {}), candidates, PlanConfig(keep=0.95))
    assert chosen_runs(found) == {("a", 3, 4)}
    assert next(s for _, s in found.runs).start == "last"


@pytest.mark.parametrize("mode", ["optimal", "paper", "uniform", "influence"])
@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 0), (0, 2)])
def test_protected_blocks_stay(mode: str, first: int, last: int) -> None:
    intervals = {"a": [(first, 3), (4, 5)], "b": [(0, 4 - last)]}
    settings = PlanConfig(mode=mode, keep=0.7, protect_first=first, protect_last=last)
    found = planner.plan(analysis_of(MODEL, intervals), random_candidates(MODEL, 3), settings)
    for name, segment in found.runs:
        assert not (name == "a" and segment.first < first)
        assert not (name == "b" and segment.last >= 5 - last)
    assert found.runs


@pytest.mark.parametrize("mode", ["optimal", "paper", "uniform", "influence"])
@pytest.mark.parametrize("budget", [{"keep": 0.05}, {"speedup": 50}, {"fit_gb": 0.01}], ids=str)
def test_an_infeasible_budget_names_one_that_works(mode: str, budget: dict[str, float]) -> None:
    analysis = analysis_of(MODEL, {"a": [(1, 3)], "b": [(0, 2)]})
    candidates = random_candidates(MODEL, 2)
    with pytest.raises(BudgetError, match=f"no {mode} plan gives") as caught:
        planner.plan(analysis, candidates, PlanConfig(mode=mode, **budget))
    kind, value = re.search(r"--(keep|speedup|fit) ([\d.]+)", str(caught.value)).groups()
    nearest = {{"fit": "fit_gb"}.get(kind, kind): float(value)}
    assert nearest.keys() == budget.keys()
    found = planner.plan(analysis, candidates, PlanConfig(mode=mode, **nearest))
    assert found.budget == nearest


def check_runs(runs: planner.Runs, model: ModelInfo, settings: PlanConfig) -> None:
    """No overlap, at least two blocks each, inside the stack and outside the protected blocks."""
    used: set[tuple[str, int]] = set()
    for name, first, last in runs:
        stack = next(s for s in model.stacks if s.name == name)
        assert 0 <= first < last < stack.num_blocks
        blocks = {(name, i) for i in range(first, last + 1)}
        assert not blocks & used
        used |= blocks
    protected = {(model.stacks[0].name, i) for i in range(settings.protect_first)}
    end = model.stacks[-1]
    protected |= {(end.name, end.num_blocks - 1 - i) for i in range(settings.protect_last)}
    assert not protected & used


def removed(runs: planner.Runs) -> int:
    return sum(last - first for _, first, last in runs)


@pytest.mark.parametrize("protect", [(0, 0), (1, 1), (2, 3)])
def test_baselines_remove_one_block_more_a_rung(protect: tuple[int, int]) -> None:
    settings = PlanConfig(protect_first=protect[0], protect_last=protect[1])
    free = (6 - protect[0], 5 - protect[1])
    for ladder in (planner.uniform_ladder(MODEL, settings), planner.influence_ladder(analysis_of(MODEL, {}), settings)):
        assert [removed(runs) for runs in ladder] == list(range(free[0] + free[1] - 1))
        for runs in ladder:
            check_runs(runs, MODEL, settings)


def test_uniform_runs_are_even() -> None:
    single = ModelInfo("Tiny", "0", 20, 0, 4, 0, (Stack("a", "n", 20, (1,) * 20),))
    for count, runs in enumerate(planner.uniform_ladder(single, PlanConfig(protect_first=1, protect_last=1))):
        sizes = [last - first + 1 for _, first, last in runs]
        sizes += [1] * (18 - count - len(sizes))  # groups of one block are kept blocks
        assert max(sizes) - min(sizes) <= 1


def test_influence_removes_the_least_influential_blocks() -> None:
    settings = PlanConfig(protect_first=1, protect_last=1)
    analysis = analysis_of(MODEL, {}, seed=4)
    scored = sorted(
        (found.influence[i], found.name, i)
        for found, blocks in zip(analysis.stacks, (range(2, 6), range(1, 4)), strict=True)
        for i in blocks
    )
    for count, runs in enumerate(planner.influence_ladder(analysis, settings)):
        gone = {(name, i) for name, first, last in runs for i in range(first + 1, last + 1)}
        assert gone == {(name, i) for _, name, i in scored[:count]}


def test_paper_adds_intervals_by_damage() -> None:
    """Damage is the squared error of each removed block: 0.25, 0.061 (twice: 0.1225 in all), 0.09 and 0.04."""
    costs = {("a", 1, 2): 0.5, ("a", 3, 5): 0.35, ("b", 0, 1): 0.3, ("b", 2, 3): 0.2}
    candidates = {run: Candidate(*run, probe_error=9.0, fitted_error=error) for run, error in costs.items()}
    analysis = analysis_of(MODEL, {"a": [(1, 2), (3, 5)], "b": [(0, 1), (2, 3)]})
    ladder = planner.paper_ladder(analysis, candidates, PlanConfig())
    order = [set(runs) for runs in ladder]
    assert order[0] == set()
    added = [(order[i + 1] - order[i]).pop() for i in range(len(order) - 1)]
    assert added == [("b", 2, 3), ("a", 3, 5), ("b", 0, 1), ("a", 1, 2)]
    for runs in ladder:
        check_runs(runs, MODEL, PlanConfig())


def test_intervals_are_not_clipped_to_what_was_never_fitted() -> None:
    analysis = analysis_of(MODEL, {"a": [(0, 3)]})
    with pytest.raises(ConfigError, match=r"interval a 0-3 takes a block that plan.protect_first=1.*run ppcl analyze"):
        planner.paper_ladder(analysis, {}, PlanConfig())


@pytest.mark.parametrize("mode", ["paper", "uniform", "influence"])
def test_baselines_stop_at_the_first_rung_that_fits(mode: str) -> None:
    analysis = analysis_of(MODEL, {"a": [(1, 2), (3, 5)], "b": [(0, 1), (2, 3)]})
    settings = PlanConfig(mode=mode, keep=0.8)
    candidates = random_candidates(MODEL, 5)
    found = planner.plan(analysis, candidates, settings)
    costs = {(c.stack, c.first, c.last): c for c in candidates.candidates}
    ladder = {
        "paper": lambda: planner.paper_ladder(analysis, costs, settings),
        "uniform": lambda: planner.uniform_ladder(MODEL, settings),
        "influence": lambda: planner.influence_ladder(analysis, settings),
    }[mode]()
    ratios = [
        predict(MODEL, planner.layout_of_runs(MODEL, runs, Candidates((), 0, 0.0))).param_ratio for runs in ladder
    ]
    assert found.predicted.param_ratio == max(ratio for ratio in ratios if ratio <= 0.8)


def test_plans_list_every_block_once() -> None:
    found = planner.plan(analysis_of(MODEL, {}), random_candidates(MODEL, 6), PlanConfig(keep=0.6))
    for stack in MODEL.stacks:
        covered = itertools.chain.from_iterable(range(s.first, s.last + 1) for s in found.stacks[stack.name])
        assert list(covered) == list(range(stack.num_blocks))


@pytest.mark.parametrize("transformer", [tiny_qwen(5), tiny_flux()], ids=["qwen", "flux"])
def test_predicted_parameters_are_those_of_the_student(transformer: torch.nn.Module) -> None:
    model = describe_alone(transformer)
    settings = PlanConfig(keep=0.75)
    found = planner.plan(analysis_of(model, {}), random_candidates(model, 1), settings)
    adapter = adapter_for(transformer)
    runs = sorted(chosen_runs(found))
    assert {run[0] for run in runs} <= {DUAL, SINGLE}
    student = build_student(transformer, adapter, Bundle(found, random_substitutes(transformer, adapter, runs)))
    assert count_params(student) == found.predicted.params
    assert found.predicted.param_ratio == found.predicted.params / count_params(transformer) <= 0.75
    assert found.predicted.bytes == 4 * count_params(student)
