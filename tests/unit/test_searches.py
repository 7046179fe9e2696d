"""Searches behind one interface: the table, what every plan must be, the orders, searches from outside."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_planner import MODEL, analysis_of, random_candidates

from ppcl.common.artifacts import load_artifact
from ppcl.config import PlanConfig, load_config
from ppcl.errors import BudgetError, ConfigError
from ppcl.pruning import planner, searches
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.searches import SEARCHES, Context, choose
from ppcl.student.plan import CompressionPlan
from ppcl.student.prediction import predict

PLANNED = ("optimal", "paper", "uniform", "influence")


def context_of(seed: int = 0, **settings: Any) -> Context:
    analysis = analysis_of(MODEL, {"a": [(1, 2), (3, 5)], "b": [(0, 1), (2, 3)]})
    return Context(analysis, random_candidates(MODEL, 5), PlanConfig(**{"keep": 0.8, **settings}), seed)


def gone(plan: CompressionPlan) -> list[tuple[str, int]]:
    """Blocks that are not the first of their segment."""
    return [(name, i) for name, s in plan.runs for i in range(s.first + 1, s.last + 1)]


@pytest.mark.parametrize("name", PLANNED)
def test_the_planners_modes_are_searches(name: str) -> None:
    context = context_of()
    found = choose(name, context)
    settings = context.settings.model_copy(update={"mode": name})
    assert found == planner.plan(context.analysis, context.candidates, settings)
    assert (found.mode, found.teacher_forwards) == (name, 0)


def test_the_table_is_known_to_the_config_and_needs_no_torch() -> None:
    for name in SEARCHES:
        assert load_config([], [f"plan.mode={name}"]).plan.mode == name
    code = (
        "import sys; from ppcl.pruning.searches import SEARCHES; SEARCHES['optimal'], SEARCHES['random']; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("budget", [{"keep": 0.8}, {"keep": 0.5}, {"speedup": 1.5}, {"fit_gb": 0.08}], ids=str)
def test_orders_remove_as_few_as_the_budget_asks(budget: dict[str, float]) -> None:
    context = context_of(**{"keep": None, **budget})
    kind, value = context.settings.budget
    order = context.removable()
    assert order == [("a", i) for i in range(2, 6)] + [("b", i) for i in range(1, 4)]
    position = choose("position", context)
    count = len(gone(position))
    assert set(gone(position)) == set(order[-count:])  # the later ones
    shuffled = list(order)
    random.Random(0).shuffle(shuffled)
    drawn = choose("random", context)
    assert set(gone(drawn)) == set(shuffled[: len(gone(drawn))])
    for plan, last in ((position, order[-count]), (drawn, shuffled[len(gone(drawn)) - 1])):
        assert planner.meets(plan.predicted, kind, value)
        fewer = [block for block in gone(plan) if block != last]
        runs = planner.removal_ladder(fewer)[-1]
        assert not planner.meets(
            predict(MODEL, planner.layout_of_runs(MODEL, runs, Candidates((), 0, 0.0))), kind, value
        )


def test_random_depends_on_the_seed_alone() -> None:
    plans = [choose("random", context_of(seed)) for seed in (0, 0, 1, 2)]
    assert plans[0] == plans[1]
    assert len({tuple(gone(plan)) for plan in plans}) > 1


@pytest.mark.parametrize("name", ["random", "position"])
def test_an_infeasible_budget_names_one_that_works(name: str) -> None:
    with pytest.raises(BudgetError, match=f"no {name} plan gives 0.05 .* nearest feasible budget is --keep") as caught:
        choose(name, context_of(keep=0.05))
    nearest = float(str(caught.value).split("--keep ")[1].split()[0])
    assert choose(name, context_of(keep=nearest)).predicted.param_ratio <= nearest


def test_nothing_to_remove_is_said() -> None:
    with pytest.raises(ConfigError, match=r"plan.mode=random: no block can go; lower plan.protect_first"):
        choose("random", context_of(protect_first=6, protect_last=5))


@pytest.mark.parametrize("name", ["path", "learned", "rarts"])
def test_a_search_that_runs_the_teacher_says_so_without_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"plan.mode={name} runs the teacher, and there is none here"):
        choose(name, context_of())


def test_unknown_names_have_a_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown search \(did you mean 'rarts'\?\); valid: optimal, paper"):
        load_config([], ["plan.mode=rart"])
    with pytest.raises(ConfigError, match="did you mean 'position'"):
        choose("positions", context_of())
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.py"):
        load_config([], ["plan.mode=nowhere.py:Own"])
    with pytest.raises(ConfigError, match=r"expected file\.py:ClassName"):
        load_config([], ["plan.mode=nowhere.py"])


# From outside

HEAD = "class Own:\n    def cost(self, context):\n        return 0\n    def choose(self, context):\n        return "
FIRST = "context.remove_in_order(context.removable())\n"


def outside(folder: Path, body: str) -> str:
    (folder / "own.py").write_text(body)
    return f"{folder / 'own.py'}:Own"


def test_a_search_of_the_users_runs(tmp_path: Path) -> None:
    name = outside(tmp_path, HEAD + FIRST)
    found = choose(name, context_of())
    assert gone(found) == context_of().removable()[: len(gone(found))]
    assert found.mode == name


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "class Other:\n    def cost(self): ...\n    def choose(self): ...\n",
            "has no 'Own'; with cost and choose: Other",
        ),
        ("class Own:\n    def cost(self, context): ...\n", r"has no method choose\(context\)"),
        ("class Own:\n    def cost(self): ...\n", r"got cost\(\), expected cost\(context\) after self"),
        ("class Own:\n    def __init__(self, k): ...\n", "made without arguments"),
        ("import nowhere_at_all\n", "cannot be imported: ModuleNotFoundError"),
        ("def f(:\n", "cannot be imported: SyntaxError"),
        (HEAD.replace("return 0", "return 'much'") + FIRST, "cost gave 'much', expected a number"),
        (HEAD.replace("return 0", "return -1") + FIRST, "cost gave -1, expected a number"),
        (HEAD + "[1]", "got list, expected a CompressionPlan"),
        (HEAD + "context.first_that_fits([(), (('a', 0, 4),)])", "a 0-4 takes a protected block"),
    ],
)
def test_what_is_wrong_with_a_search_is_one_line(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose(outside(tmp_path, body), context_of())
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_wrong_is_not_handed_on() -> None:
    context = context_of()
    good = choose("uniform", context)
    assert searches.checked(dataclasses.replace(good, budget={}), context) == good
    with pytest.raises(ConfigError, match=r"misses the budget plan.keep=0.5 \(it keeps 0.7"):
        searches.checked(good, context_of(keep=0.5))
    twice = {**good.stacks, "a": (*good.stacks["a"], good.stacks["a"][-1])}
    with pytest.raises(ConfigError, match="expected each of 6 once"):
        searches.checked(dataclasses.replace(good, stacks=twice), context)
    other = dataclasses.replace(good, model=dataclasses.replace(MODEL, params=1))
    with pytest.raises(ConfigError, match="the plan is for another model"):
        searches.checked(other, context)


def test_the_cost_is_stated_before_the_search_starts_and_kept(tmp_path: Path) -> None:
    body = HEAD.replace("return 0", "return 1200") + "context.settings.nothing\n"
    said: list[str] = []
    with pytest.raises(AttributeError):
        choose(outside(tmp_path, body), context_of(), said.append)
    assert "about 1,200 teacher forwards" in said[0]
    found = choose(outside(tmp_path, HEAD.replace("return 0", "return 1200") + FIRST), context_of(), said.append)
    assert found.teacher_forwards == 1200


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    first, second = (SEARCHES.named(outside(tmp_path / name, HEAD + FIRST)) for name in ("a", "b"))
    assert sys.modules[type(first).__module__].Own is type(first)
    assert sys.modules[type(second).__module__].Own is type(second)


def test_another_search_in_the_same_file_is_another_plan(tmp_path: Path) -> None:
    name = outside(tmp_path, HEAD + FIRST)
    first = PlanConfig(mode=name).identity()
    assert outside(tmp_path, HEAD + FIRST + "# changed\n") == name
    assert PlanConfig(mode=name).identity() != first
    assert PlanConfig(search_states=3).identity() == PlanConfig().identity()
    assert PlanConfig(mode="path", search_states=3).identity() != PlanConfig(mode="path").identity()


def test_plans_of_before_still_load(tmp_path: Path) -> None:
    import json

    from ppcl.common.artifacts import to_jsonable

    written = to_jsonable(choose("uniform", context_of()))
    del written["teacher_forwards"]
    (tmp_path / "plan.json").write_text(json.dumps(written))
    assert load_artifact(CompressionPlan, tmp_path / "plan.json").teacher_forwards == 0
