"""Select by recovery (``plan.recover``): the plan is the one that recovers best, and a killed choice ends alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppcl.capture.pairs import Pairs
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.config import load_config
from ppcl.distill.choice import Judge
from ppcl.errors import ConfigError
from ppcl.run import Run
from ppcl.student.plan import CompressionPlan, StudentErrors, plan_digest
from ppcl.teacher.calls import velocity
from ppcl.teacher.loading import load_pipeline
from ppcl.training.loop import TrainingLoop

RECOVER = ["plan.keep=0.9", "plan.recover=3", "plan.recover_steps=2", "plan.recover_states=8"]


@pytest.fixture(scope="module")
def transformer(tiny_model: Path) -> nn.Module:
    return load_pipeline(str(tiny_model), torch.device("cpu")).transformer


def planned(finished_run: Path, out: Path, inputs: tuple[Path, Path, Path], *settings: str) -> CompressionPlan:
    """The plan stage in a copy of a finished run."""
    model, prompts, config = inputs
    if not out.exists():
        shutil.copytree(finished_run, out)
    run = Run(str(model), out, load_config([config], [*RECOVER, *settings]), prompts, "test")
    assert run.run("plan")
    return load_artifact(CompressionPlan, out / "plan.json")


@pytest.fixture
def inputs(tiny_model: Path, prompts_file: Path, small_config: Path) -> tuple[Path, Path, Path]:
    return tiny_model, prompts_file, small_config


@pytest.mark.parametrize("stage", ["local", "carried", "output"])
def test_the_plan_is_the_one_that_recovers_best(
    stage: str, finished_run: Path, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plan = planned(finished_run, tmp_path / "run", inputs, f"plan.recover_stage={stage}")
    assert len(plan.recovered) == 3
    assert sorted(seen.steps for seen in plan.recovered) == [(2,), (2, 6), (2, 6)]
    best = min((seen for seen in plan.recovered if len(seen.steps) == 2), key=lambda seen: seen.after[-1].score)
    assert [seen for seen in plan.recovered if seen.chosen] == [best]
    assert best.runs == tuple(f"{name} {s.first}-{s.last}" for name, s in plan.runs)
    assert len({seen.runs for seen in plan.recovered}) == 3
    short = [seen.after[0].score for seen in plan.recovered]
    assert max(s.after[0].score for s in plan.recovered if len(s.steps) == 2) <= sorted(short)[1]
    for seen in plan.recovered:
        assert seen.before != seen.after[0]  # training did something
        for errors in (seen.before, *seen.after):
            assert len(errors.noises) == 1  # held-out prompts with a captioned state
            assert errors.caption
            assert errors.guided
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_it_is_off_by_default_and_changes_nothing(
    finished_run: Path, inputs: tuple[Path, Path, Path], small_config: Path
) -> None:
    assert load_artifact(CompressionPlan, finished_run / "plan.json").recovered == ()
    plain, other = load_config([small_config], []), load_config([small_config], ["plan.recover_steps=7"])
    assert plain.plan.identity() == other.plan.identity()
    assert not any("recover" in name for name in plain.plan.identity())


class Killed(BaseException):
    """As good as SIGKILL for what is on disk."""


@pytest.mark.parametrize("kill_at", [3, 8, 13])
def test_a_killed_choice_ends_alike(
    kill_at: int,
    finished_run: Path,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = planned(finished_run, tmp_path / "whole", inputs)
    steps, step = [0], TrainingLoop.step

    def counted(loop: Any) -> None:
        steps[0] += 1
        if steps[0] == kill_at:
            raise Killed
        step(loop)

    monkeypatch.setattr(TrainingLoop, "step", counted)
    with pytest.raises(Killed):
        planned(finished_run, tmp_path / "killed", inputs)
    assert not (tmp_path / "killed" / "plan.json").exists()
    left = 3 * 2 + 2 * 6 - (kill_at - 1)
    steps[0] = 1000
    assert planned(finished_run, tmp_path / "killed", inputs) == whole
    assert steps[0] - 1000 == left  # what was done is not done again


def test_other_training_is_another_choice(small_config: Path, finished_run: Path, inputs: tuple[Path, ...]) -> None:
    def digest(*settings: str) -> str:
        model, prompts, config = inputs
        return Run(str(model), finished_run, load_config([config], list(settings)), prompts, "").depends("plan")

    assert digest("distill.output_learning_rate=1e-4") == digest()
    assert digest(*RECOVER, "distill.output_learning_rate=1e-4") != digest(*RECOVER)
    assert digest(*RECOVER, "distill.output_steps=7") == digest(*RECOVER)  # not what is recovered with


def test_how_a_plan_was_chosen_is_no_part_of_its_digest(finished_run: Path, tmp_path: Path) -> None:
    written = json.loads((finished_run / "plan.json").read_text())
    plan = load_artifact(CompressionPlan, finished_run / "plan.json")
    del written["recovered"]
    (tmp_path / "plan.json").write_text(json.dumps(written))
    old = load_artifact(CompressionPlan, tmp_path / "plan.json")
    assert old == plan
    assert plan_digest(old) == plan_digest(plan)


def test_one_plan_is_no_choice() -> None:
    with pytest.raises(ConfigError, match=r"plan.recover=1 leaves nothing to choose from; give 2 or more"):
        load_config([], ["plan.recover=1"])


# Pairs and the judge


def test_pairs_are_what_guidance_asks(finished_run: Path, transformer: nn.Module) -> None:
    """The teacher's answer to a captioned state is the recorded one; the other differs in the text alone."""
    states, train = (States(finished_run / "calibration", split) for split in ("held-out", "train"))
    pairs = Pairs(transformer, train)
    assert pairs.branch == (1, 0)  # Qwen-Image asks without caption second
    found = list(pairs.of(states, 4))
    captioned = [row for row, mark in states.marks.items() if mark.branch == (0, 0)]
    assert sum(len(call.velocity) for call, _ in found) == len(captioned) > 0
    bare = next(row for row, mark in train.marks.items() if mark.branch == (1, 0))
    text = train.batch([bare]).arguments["encoder_hidden_states"]
    for call, other in found:
        assert other is not None
        assert torch.equal(call.arguments["hidden_states"], other["hidden_states"])
        assert torch.equal(call.arguments["timestep"], other["timestep"])
        torch.testing.assert_close(other["encoder_hidden_states"][:1], text)
        with torch.no_grad():
            torch.testing.assert_close(velocity(transformer, call.arguments), call.velocity)


def test_a_teacher_without_guidance_has_no_pairs(finished_run: Path, transformer: nn.Module) -> None:
    states = States(finished_run / "calibration", "train")
    captioned = states.only({row for row, mark in states.marks.items() if mark.branch == (0, 0)})
    captioned.marks = {row: mark for row, mark in states.marks.items() if mark.branch == (0, 0)}
    pairs = Pairs(transformer, captioned)
    assert pairs.branch is None
    assert all(other is None for _, other in pairs.of(captioned, 4))


class Shifted(nn.Module):
    """A teacher whose answer is off by a share, or by a constant."""

    def __init__(self, teacher: nn.Module, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.teacher, self.factor, self.shift = teacher, factor, shift

    def forward(self, **arguments: Any) -> Any:
        return (self.factor * self.teacher(**arguments)[0] + self.shift,)


def test_the_judge_knows_known_errors(finished_run: Path, transformer: nn.Module) -> None:
    states, train = (States(finished_run / "calibration", split) for split in ("held-out", "train"))
    judge = Judge(transformer, train, train, 8, 3.0)
    same = judge.errors(transformer)
    assert max(same.velocity, same.guided or 0, same.caption or 0) < 1e-5
    scaled = judge.errors(Shifted(transformer, factor=1.1))
    assert (scaled.velocity, scaled.guided, scaled.caption) == pytest.approx((0.1, 0.1, 0.1), rel=1e-4)
    assert len(scaled.noises) > 1
    assert scaled.noises == pytest.approx([0.1] * len(scaled.noises), rel=1e-4)
    shifted = judge.errors(Shifted(transformer, shift=0.1))  # alike in both branches: captions lose nothing
    assert shifted.caption == pytest.approx(0, abs=1e-5)
    assert shifted.velocity > 0.01
    alone = Judge(transformer, states, train, 8, None).errors(Shifted(transformer, factor=1.1))
    assert (alone.guided, alone.caption) == (None, None)
    assert alone.score == pytest.approx(0.1, rel=1e-4)


def test_the_score_is_of_guided_and_caption_error() -> None:
    assert StudentErrors(0.5).score == 0.5
    assert StudentErrors(0.5, 0.1, 0.4).score == pytest.approx(0.2)
