"""Depth and width under one budget: the dynamic programme against trying everything."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.errors import BudgetError
from ppcl.pruning.artifacts import Candidate, Candidates, WidthOption
from ppcl.pruning.knapsack import best_layouts, edges_of
from ppcl.pruning.planner import plan, select
from ppcl.student.plan import CompressionPlan
from ppcl.student.prediction import predict, unbounded
from ppcl.teacher.model_info import ModelInfo, Stack

MODEL = ModelInfo(
    "Tiny", "0", 5 * 1000 + 4 * 700, 5 * 40 + 4 * 90, 4, 0, (
        Stack("a", "num_a", 5, (1000,) * 5, (40,) * 5),
        Stack("b", "num_b", 4, (700,) * 4, (90,) * 4),
    ),
)  # fmt: skip


def random_problem(seed: int) -> tuple[list[Candidate], list[WidthOption]]:
    generator = random.Random(seed)
    runs = [
        Candidate(s.name, first, last, 1.0, "first", generator.random() * (last - first))
        for s in MODEL.stacks
        for first in range(1, s.num_blocks)
        for last in range(first + 1, min(first + 3, s.num_blocks))
    ]
    options = [
        WidthOption(
            s.name, i, group, {f"{group}.x": {"kind": "linear", "size": None}}, size, flops, generator.random() / 3
        )
        for s in MODEL.stacks
        for i in range(s.num_blocks)
        for group, size, flops in (("modulation", 300, 0), ("ffn.image", 200, 25))
    ]
    return runs, options


def adding(error: float) -> float:
    return float(unbounded(np.array(error**2)))


def brute_force(runs: list[Candidate], options: list[WidthOption], wanted: float, by_flops: bool) -> float:
    """Least cost of any layout that saves ``wanted``, by trying them all, stack by stack."""

    def stack_choices(stack: Stack) -> list[tuple[float, float]]:
        own = [c for c in runs if c.stack == stack.name]
        size = (stack.block_flops if by_flops else stack.block_params)[0]
        found = []
        for count in range(3):
            for chosen in itertools.combinations(own, count):
                covered = [i for c in chosen for i in range(c.first, c.last + 1)]
                if len(covered) != len(set(covered)):
                    continue
                inside = [
                    o
                    for o in options
                    if o.stack == stack.name
                    and (o.block not in covered or (o.group == "modulation" and o.block in [c.first for c in chosen]))
                ]
                base = (size * sum(c.removed for c in chosen), sum(adding(c.fitted_error or 0) for c in chosen))
                reachable = {base[0]: base[1]}
                for option in inside:
                    gain = option.saved_speed if by_flops else option.saved_params
                    for saved, cost in list(reachable.items()):
                        new = cost + adding(option.error)
                        if new < reachable.get(saved + gain, math.inf):
                            reachable[saved + gain] = new
                found += list(reachable.items())
        return found

    a, b = (stack_choices(stack) for stack in MODEL.stacks)
    return min((x[1] + y[1] for x in a for y in b if x[0] + y[0] >= wanted), default=math.inf)


@pytest.mark.parametrize("by_flops", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_layouts_are_as_cheap_as_trying_everything(seed: int, by_flops: bool) -> None:
    runs, options = random_problem(seed)
    layouts = best_layouts(MODEL, edges_of(MODEL, runs, options, by_flops), by_flops)
    total = MODEL.flops if by_flops else MODEL.params
    for share in (0.1, 0.3, 0.5):
        found = []
        for layout in layouts:
            prediction = predict(MODEL, layout)
            saved = total - (MODEL.flops / prediction.speedup if by_flops else prediction.params)
            if saved >= share * total - 1e-6:
                found.append(adding(prediction.error or 0.0))
        assert min(found) == pytest.approx(brute_force(runs, options, share * total, by_flops))


def test_a_model_whose_flops_are_not_known_has_as_few_classes() -> None:
    """Its time is told by parameters; a class for each FLOP would be millions."""
    stacks = tuple(Stack(s.name, s.count_field, s.num_blocks, s.block_params, ()) for s in MODEL.stacks)
    model = replace(MODEL, flops=0, stacks=stacks)
    edges = edges_of(model, *random_problem(1), by_flops=True)
    assert sum(edge.saved > 0 for edge in edges) > 10
    assert 5 < len(best_layouts(model, edges, by_flops=True, classes=20)) <= 21


def plan_of(budget: dict[str, float], width: tuple[Any, ...] | None) -> CompressionPlan:
    runs, options = random_problem(0)
    analysis = Analysis(MODEL, (), 1, {}, 0.0)
    return plan(analysis, Candidates(tuple(runs), 1, 0.0, tuple(options)), PlanConfig(width=width, **budget))


def test_a_time_budget_spends_nothing_on_what_saves_no_time() -> None:
    chosen = plan_of({"speedup": 1.3}, None)
    parts = [path for pieces in chosen.stacks.values() for piece in pieces for path in piece.width]
    assert chosen.predicted.speedup >= 1.3
    assert not any(path.startswith("modulation") for path in parts)


def test_only_the_groups_asked_for_are_used_and_what_is_too_much_is_said() -> None:
    chosen = plan_of({"keep": 0.8}, ("modulation",))
    parts = [path for pieces in chosen.stacks.values() for piece in pieces for path in piece.width]
    assert parts
    assert all(path.startswith("modulation") for path in parts)
    assert not plan_of({"keep": 0.8}, ()).has_width
    with pytest.raises(BudgetError, match=r"the nearest feasible budget is --keep 0\.\d+"):
        plan_of({"keep": 0.01}, ("modulation", "ffn"))


def test_a_ladder_of_subsets_costs_more_the_more_it_saves() -> None:
    whole = plan_of({"keep": 0.55}, None)
    errors = []
    for keep in (0.9, 0.8, 0.7, 0.6, whole.predicted.param_ratio):
        chosen = select(whole, "keep", keep)
        assert chosen.predicted.param_ratio <= keep + 1e-9
        for name, pieces in chosen.stacks.items():
            assert [i for s in pieces for i in range(s.first, s.last + 1)] == list(
                range(next(s.num_blocks for s in MODEL.stacks if s.name == name))
            )
            assert all(s in whole.stacks[name] for s in pieces if s.is_substitute)
        errors.append(chosen.predicted.error)
    assert errors == sorted(errors)
    assert chosen.stacks == whole.stacks
    with pytest.raises(BudgetError, match=r"all of them put in it is --keep 0\.5"):
        select(whole, "keep", 0.3)
    assert select(whole, "speedup", 1.05).predicted.speedup >= 1.05


def test_a_time_budget_believes_the_clock_and_not_the_flops() -> None:
    """Two ways to make every block smaller: one looks better in FLOPs and saves no time."""
    options = [
        WidthOption(s.name, i, group, {f"{group}.x": {"kind": "linear", "size": None}}, 100, flops, 0.1, time)
        for s in MODEL.stacks
        for i in range(s.num_blocks)
        for group, flops, time in (("ffn.image", 30, 0), ("ffn.text", 20, 20))
    ]
    analysis = Analysis(MODEL, (), 0, {}, 0.0)
    found = plan(analysis, Candidates((), 0, 0.0, tuple(options)), PlanConfig(speedup=1.25))
    parts = {path for pieces in found.stacks.values() for piece in pieces for path in piece.width}
    assert parts == {"ffn.text.x"}
    count = sum(len(piece.width) for pieces in found.stacks.values() for piece in pieces)
    assert found.predicted.speedup == pytest.approx(MODEL.flops / (MODEL.flops - 20 * count))
    untimed = [replace(option, saved_time=None) for option in options]
    by_flops = plan(analysis, Candidates((), 0, 0.0, tuple(untimed)), PlanConfig(speedup=1.25))
    assert "ffn.image.x" in {path for pieces in by_flops.stacks.values() for piece in pieces for path in piece.width}
