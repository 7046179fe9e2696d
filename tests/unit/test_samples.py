"""Pictures of the student while it is trained: when they are drawn, and that they disturb nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import shared_pipeline
from torch import nn
from train_worker import new_distiller, weights, write_all_states

from ppcl.eval.samples import SampleSheet
from ppcl.training.distributed import SINGLE, Group


def sheet_of(out: Path, rows: list[dict[str, Any]] | None, **changes: Any) -> SampleSheet:
    arguments: dict[str, Any] = {"prompts": ["red cat", "boat"], "num_inference_steps": 2, "seed": 0}
    arguments |= {"call_kwargs": {"height": 16, "width": 16, "true_cfg_scale": 1.0}, **changes}
    return SampleSheet(shared_pipeline(), out=out, log=None if rows is None else rows.append, **arguments)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_sheet_shows_the_student_at_the_same_noise(tmp_path: Path) -> None:
    pipeline, rows = shared_pipeline(), []
    before = (pipeline.transformer, dict(pipeline.config))
    sheet = sheet_of(tmp_path, rows)
    sheet(2, pipeline.transformer)
    other = type(pipeline.transformer)(**{k: v for k, v in pipeline.transformer.config.items() if k[0] != "_"})
    sheet(4, other)
    assert (pipeline.transformer, dict(pipeline.config)) == before
    folder = tmp_path / "samples"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("prompts.json", "step-000002.png", "step-000004.png", "teacher.png")
    ]
    assert pixels(folder / "step-000002.png") == pixels(folder / "teacher.png") != pixels(folder / "step-000004.png")
    with Image.open(folder / "teacher.png") as image:
        assert image.size == (32, 16)
    assert rows == [
        {"stage": "samples", "step": 2, "picture": "samples/step-000002.png"},
        {"stage": "samples", "step": 4, "picture": "samples/step-000004.png"},
    ]


def test_the_teachers_sheet_follows_the_prompts(tmp_path: Path) -> None:
    transformer = shared_pipeline().transformer
    sheet_of(tmp_path, [])(2, transformer)
    sheet_of(tmp_path, [], prompts=["boat"])(2, transformer)
    with Image.open(tmp_path / "samples" / "teacher.png") as image:
        assert image.size == (16, 16)
    assert json.loads((tmp_path / "samples" / "prompts.json").read_text())["prompts"] == ["boat"]


def test_processes_that_do_not_log_draw_and_write_nothing(tmp_path: Path) -> None:
    calls = []
    transformer = shared_pipeline().transformer
    handle = transformer.register_forward_hook(lambda *_: calls.append(1))
    sheet_of(tmp_path, None)(2, transformer)
    handle.remove()
    assert len(calls) == 4
    assert list(tmp_path.iterdir()) == []


def broken_transformer() -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel\nand more")

    transformer = copy.deepcopy(shared_pipeline().transformer)
    transformer.proj_out.register_forward_hook(fail)
    return transformer


def test_what_fails_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = []
    (tmp_path / "samples").write_text("a file where the folder should be")
    sheet = sheet_of(tmp_path, rows)
    for step in (2, 4):
        sheet(step, shared_pipeline().transformer)
    (tmp_path / "other").mkdir()
    sheet_of(tmp_path / "other", rows)(6, broken_transformer())
    assert rows == []
    assert len(caplog.messages) == 2 and not any("\n" in text for text in caplog.messages)
    assert "samples of step 2 could not be drawn" in caplog.messages[0]
    assert "samples of step 6 could not be drawn" in caplog.messages[1]
    assert "RuntimeError: no kernel" in caplog.messages[1]


class Others(Group):
    """Two processes, of which the other one fails at its so-manieth answer; it counts what it is told."""

    def __init__(self, fails_at: int) -> None:
        super().__init__(0, 2)
        self.fails_at, self.told = fails_at, []

    def any(self, here: bool) -> bool:
        self.told.append(here)
        return here or len(self.told) == self.fails_at


@pytest.mark.parametrize("fails_at", [1, 3, 5])
def test_a_failure_elsewhere_ends_the_drawing_before_the_student_runs(tmp_path: Path, fails_at: int) -> None:
    others, calls = Others(fails_at), []
    student = copy.deepcopy(shared_pipeline().transformer)
    student.register_forward_hook(lambda *_: calls.append(1))
    sheet = sheet_of(tmp_path, [], group=others)
    sheet(2, student)
    sheet(4, student)
    assert others.told == [False] * fails_at  # four passes and the end
    assert len(calls) == min(fails_at - 1, 4)


def test_a_failure_here_is_told_to_the_others(tmp_path: Path) -> None:
    others = Others(0)
    (tmp_path / "samples").write_text("a file where the folder should be")
    sheet_of(tmp_path, [], group=others)(2, shared_pipeline().transformer)
    assert others.told == [True]


def test_the_output_stage_draws_and_trains_the_same(tmp_path: Path) -> None:
    drawn: list[int] = []

    def look(step: int, student: nn.Module) -> None:
        assert student is watched.student
        drawn.append(step)
        torch.manual_seed(step)  # whatever drawing does to the global generator

    for name in ("plain", "watched"):
        write_all_states(tmp_path / name)
    plain = new_distiller(tmp_path / "plain", "all", SINGLE)
    watched = new_distiller(tmp_path / "watched", "all", SINGLE, sample_every=2)
    watched.sample = look
    assert plain.settings.identity() == watched.settings.identity()
    plain.run()
    watched.run()
    assert drawn == [2]
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(watched)[name])
