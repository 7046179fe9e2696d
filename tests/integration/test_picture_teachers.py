"""The real command on teachers that start from a picture: editing, filling, image to video."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_pipelines import PICTURED, small_sources

from ppcl import cli
from ppcl.capture.states import States
from ppcl.config import CaptureConfig
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
    rows = []
    for number in range(9):
        for kind, shade in (("before", 0), ("after", 255)):
            Image.new("RGB", (40, 48), (number * 20, 90, shade)).save(folder / f"{kind}-{number}.png")
        names = {"file_name": f"after-{number}.png", "source": f"before-{number}.png"}
        rows.append({**names, "text": f"make it {number} cats"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
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
