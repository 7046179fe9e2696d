"""Allocations: budgets met exactly, shares by hand, plans without a removed block."""

from __future__ import annotations

import random

import pytest
from test_knapsack import MODEL

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.errors import BudgetError
from ppcl.pruning.allocations import ALLOCATIONS, Class, allotted_layouts, nirvana
from ppcl.pruning.artifacts import Candidates, WidthOption
from ppcl.pruning.planner import plan
from ppcl.teacher.model_info import ModelInfo


def test_the_amount_is_met_exactly_whatever_the_sizes() -> None:
    draw = random.Random(0)
    for _ in range(500):
        classes = {
            str(i): Class(draw.choice([0, 1, 10 ** draw.randint(1, 9)]), draw.random(), draw.uniform(0.1, 5))
            for i in range(draw.randint(1, 7))
        }
        most = sum(c.cap * c.size for c in classes.values())
        amount = most * draw.choice([0, 1, draw.random()])
        for allocate in ALLOCATIONS.values():
            shares = allocate(classes, amount)
            assert sum(shares[n] * c.size for n, c in classes.items()) == pytest.approx(amount, rel=1e-9)
            assert all(0 <= shares[n] <= c.cap for n, c in classes.items())


def test_shares_by_hand() -> None:
    classes = {"ffn": Class(300, 0.5, 3), "attention": Class(100, 0.8, 1)}
    # f = 100 / (3 * 300 + 100) = 0.1
    assert nirvana(classes, 100) == {"ffn": pytest.approx(0.3), "attention": pytest.approx(0.1)}
    # f = 0.2: 0.6 of the networks is above their cap, the heads give the other 50
    assert nirvana(classes, 200) == {"ffn": 0.5, "attention": pytest.approx(0.5)}
    assert ALLOCATIONS["uniform"](classes, 100) == {"ffn": 0.25, "attention": 0.25}
    with pytest.raises(BudgetError, match="can give 230 at most"):
        nirvana(classes, 231)


def measured(model: ModelInfo) -> tuple[WidthOption, ...]:
    """Two sizes of a network of 40 neurons and an attention of 8 heads, in every block."""
    made = []
    for stack in model.stacks:
        for block in range(stack.num_blocks):
            for group, kind, of, unit, sizes in (
                ("ffn.image", "narrow", 40, 1, (20, 10)),
                ("attention", "heads", 8, 4, (4,)),
            ):
                for size in sizes:
                    part = {"kind": kind, "size": size, "of": of}
                    saved = (of - size) * unit
                    made.append(WidthOption(stack.name, block, group, {group: part}, saved, saved, 0.1))
            linear = {"kind": "linear", "size": 0}
            made.append(WidthOption(stack.name, block, "ffn.image", {"ffn.image": linear}, 35, 35, 0.0))
    return tuple(made)


def test_plans_cut_the_same_share_everywhere_and_no_block() -> None:
    model = MODEL
    options, analysis = measured(model), Analysis(model, (), 0, {}, 0.0)
    blocks = sum(stack.num_blocks for stack in model.stacks)
    keep = 1 - 12 * blocks / model.params  # 12 of the 72 that each block's units have
    found = {}
    for name in ALLOCATIONS:
        settings = PlanConfig(mode="allocation", keep=keep, allocation=name)
        found[name] = plan(analysis, Candidates((), 0, 0.0, options), settings)
        made = found[name].predicted
        assert keep - 30 / model.params <= made.param_ratio <= keep + 1e-9  # to within a size of one module
        segments = [s for stack in found[name].stacks.values() for s in stack]
        assert all(s.first == s.last for s in segments)
        assert not any(part["kind"] == "linear" for s in segments for part in s.width.values())
        counts = [sum("ffn.image" in s.width for s in segments[i : i + 2]) for i in range(0, len(segments), 2)]
        assert max(counts) - min(counts) <= 1  # spread out
        added = sum(len(s.width) for s in segments) * 0.1**2 / (1 - 0.1**2 / 2)
        assert made.error == pytest.approx((added / (1 + added / 2)) ** 0.5)  # large errors add up to less
    heads = {n: sum("attention" in s.width for stack in p.stacks.values() for s in stack) for n, p in found.items()}
    assert heads["nirvana"] < heads["uniform"]


def test_the_ladder_grows_and_what_cannot_be_is_said() -> None:
    model = MODEL
    options, analysis = measured(model), Analysis(model, (), 0, {}, 0.0)
    ladder = allotted_layouts(model, options, "nirvana", 3.0)
    assert ladder[0] == []
    assert {(o.group, next(iter(o.parts.values()))["size"]) for o in ladder[-1]} == {
        ("ffn.image", 10),
        ("attention", 4),
    }
    with pytest.raises(BudgetError, match=r"nearest feasible budget is --keep .*smaller fit\.width_shares"):
        plan(analysis, Candidates((), 0, 0.0, options), PlanConfig(mode="allocation", keep=0.01))
    with pytest.raises(BudgetError, match=r"none were measured; add ffn or attention to fit\.width"):
        plan(analysis, Candidates((), 0, 0.0), PlanConfig(mode="allocation", keep=0.9))


def test_other_modes_do_not_depend_on_the_allocation() -> None:
    assert PlanConfig(gamma=1.0).identity() == PlanConfig().identity()
    assert PlanConfig(mode="allocation", gamma=1.0).identity() != PlanConfig(mode="allocation").identity()
