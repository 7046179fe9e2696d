"""How rows of a table are trained: one recipe for all of them, and digests of what it depends on alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import DUAL, plan_for, tiny_qwen

from ppcl.config import DistillConfig, RunConfig, load_config
from ppcl.experiments import runner as runner_module
from ppcl.experiments import study as study_module
from ppcl.experiments.ablation import _stages
from ppcl.experiments.runner import Row, RowRunner
from ppcl.experiments.study import study_sequence
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import adapter_for


@pytest.mark.parametrize("how", ["one_at_a_time", "release_gradients"])
def test_sequential_rows_of_the_ablation_are_sequential(how: str) -> None:
    rows = _stages(DistillConfig.model_validate({how: True}))
    assert rows["sequential"].sequence == "sequential"
    assert not any(getattr(row, how) is True for row in rows.values())


class Stop(Exception):
    """Raised in the place of a training."""


def fake_run(folder: Path, config: RunConfig) -> Any:
    transformer = tiny_qwen(4)
    teacher = SimpleNamespace(transformer=transformer)
    more = {"identity": "x", "evaluation_prompts": ["a"], "model": "m", "device": "cpu", "depends": lambda stage: stage}
    more |= {"keep_whole": lambda: None, "transformer": transformer, "component": "transformer"}
    found = SimpleNamespace(config=config, out=folder, teacher=teacher, adapter=adapter_for(transformer), **more)
    found.calibration = folder / "calibration"
    found.with_config = lambda config: found
    return found


def plan() -> CompressionPlan:
    return plan_for(tiny_qwen(4), [(DUAL, 1, 2)])


def test_the_study_measures_the_plan_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    bundle = SimpleNamespace(plan=plan(), substitutes={})
    given: list[DistillConfig] = []

    class Trainer:
        def __init__(self, *args: Any) -> None:
            given.append(args[5])

        def run(self) -> None:
            """Train nothing."""

    monkeypatch.setattr(study_module, "Distiller", Trainer)
    monkeypatch.setattr(study_module, "load_bundle", lambda *_: bundle)
    monkeypatch.setattr(study_module, "assemble_student", lambda _t, _a, found, _s: made.append(found))
    ruler: Any = SimpleNamespace(error=lambda student: 0.5)
    config = load_config([], ["distill.release_gradients=true", "distill.shard=true"])
    study_sequence(fake_run(tmp_path, config), ruler, plan(), (0,))
    assert [found is bundle.plan for found in made] == [False, True, True]
    assert [settings.sequence for settings in given] == ["non-sequential", "sequential"]
    assert not any(settings.release_gradients is True for settings in given)


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """What a row's training depends on."""
    seen: list[dict[str, str]] = []

    def claim(folder: Path, depends: dict[str, str], products: Any) -> None:
        seen.append(depends)
        raise Stop

    monkeypatch.setattr(runner_module, "claim", claim)
    config = load_config([], list(overrides))
    run = fake_run(folder, config)
    with pytest.raises(Stop):
        RowRunner(run).run(Row("a", "a", plan(), config.distill), 0)
    return seen[0]["trained"]


def test_a_row_depends_on_what_is_trained_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(tmp_path, monkeypatch)
    assert trained(tmp_path, monkeypatch, "distill.keep_checkpoints=3") == plain
    assert trained(tmp_path, monkeypatch, "distill.batch_size=3") != plain
    own = tmp_path / "own.py"
    own.write_text("class Own: ...")
    sparse = [f"sparsity.criterion={own}:Own", "sparsity.share=0.5"]
    before = trained(tmp_path, monkeypatch, *sparse)
    own.write_text("class Own: x = 1")
    assert trained(tmp_path, monkeypatch, *sparse) != before
