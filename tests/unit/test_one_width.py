"""Plans in which all networks have one width: against trying everything, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_planner import analysis_of

from ppcl.config import PlanConfig, RunConfig
from ppcl.errors import BudgetError, ModelError
from ppcl.pruning import exchanges, knapsack
from ppcl.pruning.artifacts import Candidate, Candidates, WidthOption
from ppcl.pruning.knapsack import put_in
from ppcl.pruning.planner import plan
from ppcl.pruning.stock_widths import check_uniform
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.prediction import predict
from ppcl.teacher.families import ADAPTERS
from ppcl.teacher.model_info import ModelInfo, Stack

BLOCKS = 4
MODEL = ModelInfo(
    "Tiny",
    "0",
    2 * BLOCKS * 100,
    2 * BLOCKS * 100,
    4,
    0,
    tuple(Stack(name, f"num_{name}", BLOCKS, (100,) * BLOCKS, (100,) * BLOCKS) for name in ("a", "b")),
)


def option(stack: str, block: int, size: int, error: float, path: str = "ff") -> WidthOption:
    kept = f"{(1 << size) - 1:x}"
    part = {"kind": "narrow", "size": size, "of": 8, "kept": kept, "rows": ["up"], "columns": ["down"]}
    return WidthOption(stack, block, f"ffn.{path}", {path: part}, 5 * (8 - size), 5 * (8 - size), error)


def measured(seed: int) -> Candidates:
    """Runs of two, and networks at a half and three quarters, whose vectors have much in common."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(2, 3))
    places = [(stack.name, index) for stack in MODEL.stacks for index in range(BLOCKS)]
    vectors: dict[str, Any] = {}

    def error_of(scale: float) -> tuple[float, Any]:
        vector = scale * (generator.normal(size=(2, 3)) + 1.5 * common * generator.normal())
        return float(np.sqrt((vector**2).sum() * generator.uniform(0.9, 1.4))), vector

    options = []
    for (name, block), size in itertools.product(places, (4, 6)):
        error, vector = error_of(0.3 * (8 - size))
        options.append(option(name, block, size, error))
        vectors[options[-1].name] = vector
    runs = []
    for name, first in ((n, i) for n, i in places if i + 1 < BLOCKS):
        error, vector = error_of(0.8)
        runs.append(Candidate(name, first, first + 1, error, "first", error))
        vectors[runs[-1].name] = vector
    return Candidates(tuple(runs), 0, 0.0, tuple(options), vectors=vectors)


def every_plan(found: Candidates) -> Iterator[dict[str, tuple[Segment, ...]]]:
    """Each set of runs at each width, with what is known of it."""
    sets = {
        stack.name: [
            runs
            for count in range(BLOCKS // 2 + 1)
            for runs in itertools.combinations([r for r in found.candidates if r.stack == stack.name], count)
            if all(a.last < b.first for a, b in itertools.pairwise(runs))
        ]
        for stack in MODEL.stacks
    }
    for size, *choice in itertools.product((8, 6, 4), *sets.values()):
        inside = {(o.stack, o.block): (o,) for o in found.width if o.parts["ff"]["size"] == size}
        stacks = {}
        for stack, runs in zip(MODEL.stacks, choice, strict=True):
            pieces = [Segment(r.first, r.last, r.start) for r in runs]
            pieces += [Segment(i, i) for i in range(BLOCKS) if not any(p.first <= i <= p.last for p in pieces)]
            pieces.sort(key=lambda piece: piece.first)
            by_span = {(r.first, r.last): r for r in runs}
            stacks[stack.name] = tuple(
                put_in(
                    piece,
                    by_span.get((piece.first, piece.last)),
                    inside.get((stack.name, start_index(piece.first, piece.last, piece.start)), ()),
                    found.vectors,
                )[0]
                for piece in pieces
            )
        yield stacks


def sizes(chosen: CompressionPlan) -> set[int]:
    pieces = [piece for segments in chosen.stacks.values() for piece in segments]
    return {part["size"] for piece in pieces for part in piece.width.values()} | {8 for p in pieces if not p.width}


@pytest.mark.parametrize(
    "budget", [{"keep": 0.95}, {"keep": 0.8}, {"keep": 0.6}, {"speedup": 1.3}, {"speedup": 2.0}], ids=str
)
@pytest.mark.parametrize("seed", range(4))
def test_the_best_plan_of_one_width_is_found(
    budget: dict[str, float], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (knapsack, exchanges):  # so that what is looked for is what is predicted
        monkeypatch.setattr(module, "SHARE", 1.0)
    found = measured(seed)
    settings = PlanConfig(protect_first=0, protect_last=0, uniform_width=True, **budget)
    chosen = plan(analysis_of(MODEL, {}), found, settings)
    assert len(sizes(chosen)) == 1
    assert chosen.predicted == predict(MODEL, chosen.stacks)
    ((kind, value),) = budget.items()
    predictions = [predict(MODEL, stacks) for stacks in every_plan(found)]
    enough = [p for p in predictions if (p.param_ratio <= value if kind == "keep" else p.speedup >= value)]
    assert chosen.predicted.error == pytest.approx(min(p.error or 0.0 for p in enough))


def test_widths_that_a_block_lacks_are_not_used_and_the_nearest_budget_is_named() -> None:
    found = measured(0)
    lacking = replace(found, width=tuple(o for o in found.width if o.name != found.width[0].name))  # a block's half
    settings = PlanConfig(protect_first=0, protect_last=0, uniform_width=True, keep=0.35)
    assert sizes(plan(analysis_of(MODEL, {}), lacking, settings.model_copy(update={"keep": 0.45}))) == {6}
    assert plan(analysis_of(MODEL, {}), found, settings.model_copy(update={"keep": 0.4})).predicted.param_ratio == 0.4
    with pytest.raises(BudgetError, match=r"no optimal plan gives 0.35 .* is --keep 0.4 "):
        plan(analysis_of(MODEL, {}), found, settings)


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings, message in (
        ({"plan": {"uniform_width": True, "mode": "path"}}, "kept by plan.mode=optimal, got path"),
        ({"plan": {"uniform_width": True, "width": ["modulation"]}}, "plan.width leaves out ffn"),
        ({"plan": {"uniform_width": True}, "fit": {"width": ["modulation"]}}, "fit.width leaves out ffn"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(settings)


def test_what_was_planned_without_it_stays_as_it_is() -> None:
    assert "uniform_width" not in PlanConfig().identity()
    assert PlanConfig(uniform_width=True).identity()["uniform_width"] is True


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_family_without_such_a_number_is_told_what_works(name: str) -> None:
    if ADAPTERS[name].ffn_field:
        check_uniform(ADAPTERS[name], name)
        with pytest.raises(ModelError, match="has modules of many sizes already"):
            check_uniform(ADAPTERS[name], f"PPCL{name}")
        return
    with pytest.raises(ModelError, match=rf"config of {name} has no number .*; leave it out and set plan.width=\[\]"):
        check_uniform(ADAPTERS[name], name)
