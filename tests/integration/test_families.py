"""The real command on a tiny pipeline of each kind that diffusers has, and plain diffusers on what comes out."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import PIPELINES

from ppcl import cli
from ppcl.eval.results import load_evaluation

SIDE = 32
FRAMES = 5
VIDEOS = ("Wan", "HunyuanVideo")  # pipelines of
# What a family's own shape asks for: Z-Image keeps most of its parameters outside of its blocks.
KEEP = {"z_image": 0.93}
ABSENT = {"sd3_without_t5": {"text_encoder_3": None, "tokenizer_3": None}}
OPTIONS = (
    *(f"capture.{name}={value}" for name, value in (("height", SIDE), ("width", SIDE), ("num_frames", FRAMES))),
    *("capture.num_inference_steps=2", "fit.max_candidates=3", "fit.steps=2", "device=cpu"),
    *("distill.local_steps=3", "distill.output_steps=2", "evaluate.num_prompts=2", "evaluate.num_inference_steps=2"),
)


# FLUX and Z-Image go through the same command in test_families_width.py, Wan in test_picture_teachers.py
QUICK = ("pixart", "sd3")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(PIPELINES)]


@pytest.fixture(scope="module", params=FAMILIES)
def compressed(request, prompts_file, small_config, tmp_path_factory):
    """A family's teacher, compressed by the command line from an ordinary folder."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    teacher = PIPELINES[request.param]()
    teacher.save_pretrained(folder / "model")
    arguments = ["compress", folder / "model", "--out", folder / "run", "--config", small_config]
    arguments += ["--prompts", prompts_file, "--keep", KEEP.get(request.param, 0.9)]
    arguments += [part for option in OPTIONS for part in ("--set", option)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        cli.main()
    assert not stop.value.code
    return SimpleNamespace(name=request.param, teacher=teacher, run=folder / "run")


def draw(pipeline):
    """One prompt's picture, or the frames of its video."""
    pipeline.set_progress_bar_config(disable=True)
    video = type(pipeline).__name__.startswith(VIDEOS)
    output = pipeline(
        prompt="red cat", height=SIDE, width=SIDE, num_inference_steps=2, output_type="pil",
        generator=torch.Generator().manual_seed(0), **({"num_frames": FRAMES} if video else {}),
    )  # fmt: skip
    return output.frames[0] if video else output.images


def test_plain_diffusers_loads_and_draws_what_the_command_wrote(compressed):
    from diffusers import DiffusionPipeline

    folder = compressed.run / "pipeline"
    absent = ABSENT.get(compressed.name, {})
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    assert type(pipeline) is type(compressed.teacher)
    assert type(pipeline.transformer) is type(compressed.teacher.transformer)
    plan = json.loads((compressed.run / "plan.json").read_text())
    params = sum(p.numel() for p in pipeline.transformer.parameters())
    assert params == plan["predicted"]["params"]
    assert params < sum(p.numel() for p in compressed.teacher.transformer.parameters())
    pictures = draw(pipeline)
    video = type(pipeline).__name__.startswith(VIDEOS)
    assert len(pictures) == (FRAMES if video else 1)
    assert all(picture.size == (SIDE, SIDE) for picture in pictures)
    card = (folder / "README.md").read_text()
    assert all(f", {name}=None" in card for name in absent)
    assert ("text-to-video" if video else "text-to-image") in card


def test_report_and_numbers(compressed):
    result = load_evaluation(compressed.run / "eval" / "metrics.json")
    (row,) = result.comparisons
    for numbers in (*(model.numbers for model in result.models), row.fidelity):
        assert not {name: entry for name, entry in numbers.items() if not math.isfinite(entry.value)}
    for model in result.models:
        assert not {name for name, value in model.costs.items() if value is None or not math.isfinite(value)}
    assert 0 < row.fidelity["velocity_error"].value < 1
    assert 0 < row.fidelity["ssim"].value < 1  # the student draws something, and something else
    pictures = sorted(p.name for p in (compressed.run / "eval" / "student" / "seed-0").glob("*.png"))
    assert pictures == ["0000.png", "0001.png"]
    assert "</html>" in (compressed.run / "report.html").read_text()
