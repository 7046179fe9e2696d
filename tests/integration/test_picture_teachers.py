"""The real command on teachers that start from a picture: editing, filling, image to video."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_pipelines import PICTURED, PIPELINES, picture_pairs, small_sources

from ppcl import cli
from ppcl.capture.states import States
from ppcl.config import CaptureConfig
from ppcl.errors import UserError
from ppcl.eval.results import load_evaluation

OPTIONS = (
    *("capture.height=32", "capture.width=32", "capture.num_frames=5", "capture.num_inference_steps=2"),
    *("capture.source_column=source", "fit.max_candidates=3", "fit.steps=2", "device=cpu", "distill.local_steps=3"),
    *("distill.output_steps=2", "distill.sample_every=1", "evaluate.num_prompts=2", "evaluate.num_inference_steps=2"),
)


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        small_sources(patch)
        patch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        cli.main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine pairs of pictures, and what makes the second of the first."""
    folder = tmp_path_factory.mktemp("pairs")
    picture_pairs(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        *("flux_fill", "wan_image_to_video"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen_edit", "flux_kontext")),
    ],
)
def compressed(request, data, small_config, tmp_path_factory):
    """A teacher of each kind, compressed by the command line with pairs of pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    teacher = PICTURED[request.param]()
    teacher.save_pretrained(folder / "model")
    arguments = ["compress", folder / "model", "--out", folder / "run", "--config", small_config, "--keep", 0.9]
    sets = [part for option in (*OPTIONS, f"capture.data={data}") for part in ("--set", option)]
    assert call(*arguments, *sets) == 0
    return SimpleNamespace(model=folder / "model", run=folder / "run", kind=type(teacher), data=data)


def test_calibration_and_evaluation_have_pictures_of_their_own(compressed):
    drawn = json.loads((compressed.run / "eval" / "student" / "seed-0" / "prompts.json").read_text())
    assert drawn["pictures"] == [f"before-{text.split()[2]}.png" for text in drawn["prompts"]]
    calibrated = {
        mark.prompt
        for split in ("train", "held-out")
        for mark in States(compressed.run / "calibration", split).marks.values()
    }
    assert len(calibrated) == 7 and not calibrated & set(drawn["prompts"])
    (row,) = load_evaluation(compressed.run / "eval" / "metrics.json").comparisons
    assert row.fidelity["velocity_error"].value < 1
    assert (compressed.run / "samples" / "teacher.png").is_file()


def test_what_was_written_loads_and_starts_from_a_picture(compressed, monkeypatch):
    from diffusers import DiffusionPipeline

    from ppcl.teacher.pipeline_call import PicturedPrompt, call_pipeline, guidance_arguments

    small_sources(monkeypatch)
    student = DiffusionPipeline.from_pretrained(compressed.run / "pipeline")
    assert type(student) is compressed.kind
    student.set_progress_bar_config(disable=True)
    prompt = PicturedPrompt("make it 3 cats", "x", lambda: Image.open(compressed.data / "before-3.png"))
    small = guidance_arguments(student, CaptureConfig(height=32, width=32, num_frames=5))
    call_pipeline(student, [prompt], num_inference_steps=2, output_type="pil", **small)
    card = (compressed.run / "pipeline" / "README.md").read_text()
    assert ("image-to-video" if "Wan" in compressed.kind.__name__ else "image-to-image") in card


DRAWN = [option for option in OPTIONS if "source_column" not in option and "sample_every" not in option]


def with_sources(model, run, small_config, sources, command="compress", more=()):
    """Run a command on a teacher whose pictures to start from are drawn; eight calibrate and some evaluate."""
    options = (*DRAWN, f"capture.sources={sources}", *more)
    sets = [part for option in options for part in ("--set", option)]
    return call(command, model, "--out", run, "--config", small_config, "--keep", 0.9, *sets)


def rows_of(run):
    table = run / "calibration" / "sources" / "metadata.jsonl"
    return [json.loads(line) for line in table.read_text().splitlines()]


@pytest.mark.slow
def test_a_teacher_draws_its_own_sources_and_is_evaluated_on_others(small_config, tmp_path, monkeypatch):
    from ppcl.eval import generate

    torch.manual_seed(0)
    PICTURED["flux_kontext"]().save_pretrained(tmp_path / "model")
    run, call_pipeline = tmp_path / "run", generate.call_pipeline

    def stopped(*arguments, **more):
        if (run / "calibration" / "sources" / "0003.png").is_file():
            raise UserError("stopped")
        return call_pipeline(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "call_pipeline", stopped)
        assert with_sources(tmp_path / "model", run, small_config, "teacher") == 2
    first = (run / "calibration" / "sources" / "0000.png").stat().st_mtime_ns
    assert with_sources(tmp_path / "model", run, small_config, "teacher") == 0
    assert (run / "calibration" / "sources" / "0000.png").stat().st_mtime_ns == first
    rows = rows_of(run)
    shown = json.loads((run / "calibration" / "sources" / "prompts.json").read_text())["prompts"]
    assert len(rows) == 10 and all(row["text"] != text for row, text in zip(rows, shown, strict=True))
    by_text = {row["text"]: row["file_name"] for row in rows}
    drawn = json.loads((run / "eval" / "student" / "seed-0" / "prompts.json").read_text())
    assert drawn["pictures"] == [by_text[text] for text in drawn["prompts"]]
    marks = [mark for split in ("train", "held-out") for mark in States(run / "calibration", split).marks.values()]
    calibrated = {mark.prompt for mark in marks}
    assert len(calibrated) == 8 and not calibrated & set(drawn["prompts"])
    evaluated = call(
        "evaluate", run, "--out", tmp_path / "judged", "--set", "evaluate.teacher_seeds=1", "--set", "device=cpu"
    )
    assert evaluated == 0
    judged = json.loads((tmp_path / "judged" / "pictures" / "student" / "seed-0" / "prompts.json").read_text())
    assert judged["pictures"] == drawn["pictures"]


def test_another_pipeline_draws_first_frames(small_config, tmp_path, capsys):
    torch.manual_seed(0)
    PICTURED["wan_image_to_video"]().save_pretrained(tmp_path / "model")
    PIPELINES["flux"]().save_pretrained(tmp_path / "drawer")
    model, run = tmp_path / "model", tmp_path / "run"
    assert with_sources(model, run, small_config, "teacher", "capture") == 2
    assert "WanImageToVideoPipeline does not draw from a prompt alone; name a text-to-image" in capsys.readouterr().err
    assert with_sources(tmp_path / "drawer", run, small_config, "teacher", "capture") == 2
    assert "FluxPipeline starts from no picture, so capture.sources has no use" in capsys.readouterr().err
    assert with_sources(model, run, small_config, "teacher", "capture", [f"capture.data={tmp_path}"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert with_sources(model, run, small_config, tmp_path / "drawer", "capture") == 0
    shown = json.loads((run / "calibration" / "sources" / "prompts.json").read_text())["prompts"]
    assert [row["text"] for row in rows_of(run)] == shown
    with Image.open(run / "calibration" / "sources" / "0000.png") as picture:
        assert picture.size == (32, 32)


def test_an_editing_teacher_that_needs_a_picture_is_tried_once(small_config, tmp_path, capsys):
    torch.manual_seed(0)
    PICTURED["qwen_edit"]().save_pretrained(tmp_path / "model")
    assert with_sources(tmp_path / "model", tmp_path / "run", small_config, "teacher", "capture") == 2
    assert "QwenImageEditPipeline does not draw from a prompt alone; name a text-to-image" in capsys.readouterr().err
