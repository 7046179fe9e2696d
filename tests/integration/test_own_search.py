"""Searches on the command line: one in a file outside the package, and those that run the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ppcl.cli import app
from ppcl.common.artifacts import load_artifact
from ppcl.student.plan import CompressionPlan

OWN = """
class Last:
    def cost(self, context):
        return 7

    def choose(self, context):
        assert context.teacher.held_out
        return context.remove_in_order(context.removable()[::-1])
"""


@pytest.fixture
def planning(finished_run: Path, tiny_model: Path, prompts_file: Path, small_config: Path, tmp_path: Path) -> list[str]:
    """``ppcl plan`` on a copy of a finished run."""
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    options = ("--out", out, "--config", small_config, "--prompts", prompts_file)
    return ["plan", str(tiny_model), *map(str, options)]


def planned(arguments: list[str]) -> tuple[CompressionPlan, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return load_artifact(CompressionPlan, Path(arguments[3]) / "plan.json"), result.output


def test_a_search_in_a_file_of_the_users_runs(planning: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path / 'own.py'}:Last"
    plan, said = planned([*planning, "--mode", name])
    assert (plan.mode, plan.teacher_forwards) == (name, 7)
    assert [(s.first, s.last) for _, s in plan.runs] == [(2, 4)]  # two of six, the last one protected
    assert "about 7 teacher forwards" in said
    (tmp_path / "own.py").write_text(OWN.replace("[::-1]", ""))
    plan, _ = planned([*planning, "--mode", name])  # another file, another plan
    assert [(s.first, s.last) for _, s in plan.runs] == [(1, 3)]


@pytest.mark.parametrize("name", ["path", "learned", "rarts"])
def test_searches_that_run_the_teacher(name: str, planning: list[str]) -> None:
    sizes = ("plan.search_states=4", "plan.search_steps=1", "plan.search_batch=2")
    plan, said = planned([*planning, "--mode", name, *(part for size in sizes for part in ("--set", size))])
    assert plan.mode == name
    assert plan.predicted.param_ratio <= 0.8
    assert f"plan.mode={name}: about {plan.teacher_forwards:,.0f} teacher forwards" in said


def test_a_search_that_cannot_be_used_leaves_the_old_plan(planning: list[str], tmp_path: Path) -> None:
    before = (Path(planning[3]) / "plan.json").read_text()
    (tmp_path / "own.py").write_text(OWN.replace("context.remove_in_order", "list"))
    result = CliRunner().invoke(app, [*planning, "--mode", f"{tmp_path / 'own.py'}:Last"])
    assert result.exit_code != 0
    assert "got list, expected a CompressionPlan" in str(result.exception)
    assert (Path(planning[3]) / "plan.json").read_text() == before
