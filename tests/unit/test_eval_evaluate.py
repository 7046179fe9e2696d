"""The whole evaluation with a teacher of noise, a student that is nearly it, and hand-made features."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ppcl.config import EvaluateConfig
from ppcl.errors import UserError
from ppcl.eval.evaluate import average_drop, evaluate, finite, spread
from ppcl.eval.fid import fid, kid
from ppcl.eval.fidelity import psnr
from ppcl.eval.generate import load_images

PROMPTS = [f"a picture of {i}" for i in range(12)]
SIDE = 16
TIMINGS = {
    "times_as_fast",
    "latency_ms",
    "latency_p10_ms",
    "latency_p90_ms",
    "latency_end_to_end_ms",
    "peak_memory_bytes",
}


class BlockPipeline:
    """Draws a bright block at the place its prompt names, under the generators' noise.

    Args:
        error: Standard deviation of a fixed disturbance (the student's mistakes), in grey levels.
    """

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.drawn = error, 0

    def __call__(
        self, prompt: list[str], generator: list[torch.Generator], num_inference_steps: int, output_type: str = "pil"
    ) -> SimpleNamespace:
        images = []
        for text, one in zip(prompt, generator, strict=True):
            row, column = divmod(int(text.split()[-1]), 4)
            picture = 60 + 30 * torch.randn(3, SIDE, SIDE, generator=one)
            picture[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 50
            wrong = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(len(text) + row + column))
            picture = (picture + self.error * wrong).clamp(0, 255).to(torch.uint8)
            images.append(Image.fromarray(picture.permute(1, 2, 0).numpy()))
            self.drawn += 1
        return SimpleNamespace(images=images)


class BlockExtractor:
    """Features are the 4 x 4 mean brightness; a text's are its block.

    Args:
        text_tower: Whether it knows texts.
    """

    name = "blocks"

    def __init__(self, text_tower: bool = True) -> None:
        self.text_tower = text_tower

    def image_features(self, images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images.float().mean(1), 4).flatten(1)
        return small - small.mean(1, keepdim=True)

    def text_features(self, texts: Sequence[str]) -> Tensor | None:
        numbers = torch.tensor([int(text.split()[-1]) for text in texts])
        return F.one_hot(numbers, 16).float() - 1 / 16 if self.text_tower else None


def run(folder: Path, error: float = 25.0, **changes: Any) -> dict[str, Any]:
    settings = {"num_inference_steps": 2, "batch_size": 5, "teacher_seeds": 3, "latency_runs": 2}
    arguments: dict[str, Any] = {
        "prompts": PROMPTS,
        "folder": folder,
        "settings": EvaluateConfig(**{**settings, **changes.pop("settings", {})}),
        "call_kwargs": {},
        "references": torch.randint(0, 256, (20, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator()),
        "extractor": BlockExtractor(),
        "velocity_error": 0.25,
        "transformer_calls": (lambda: None, lambda: None),
        "seed": 5,
        "params": (1000, 600),
        **changes,
    }
    pipelines = arguments.pop("pipelines", None) or (BlockPipeline(), BlockPipeline(error))
    return evaluate(*pipelines, **arguments)


def untimed(value: Any) -> Any:
    if isinstance(value, list):
        return [untimed(entry) for entry in value]
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMINGS and not k.startswith("speedup")}
    return value


def images_of(folder: Path) -> Tensor:
    return load_images(sorted(folder.glob("*.png")))


def test_metrics_file_and_its_numbers(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(found))
    assert (found["schema_version"], found["features"], found["num_inference_steps"]) == (1, "blocks", 2)
    assert found["samples"] == {"prompts": 12, "references": 20, "teacher_seeds": 3}
    assert found["fid_reference"] == "real"
    assert sorted(p.name for p in (tmp_path / "teacher").iterdir()) == ["seed-5", "seed-6", "seed-7"]
    assert [p.name for p in (tmp_path / "student").iterdir()] == ["seed-5"]
    teacher, student = images_of(tmp_path / "teacher" / "seed-5"), images_of(tmp_path / "student" / "seed-5")
    references = torch.randint(0, 256, (20, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator())
    describe = BlockExtractor().image_features
    assert found["teacher"]["fid"] == fid(describe(teacher), describe(references))
    assert found["student"]["kid"] == kid(describe(student), describe(references))
    assert found["fidelity"]["psnr"] == psnr(teacher, student).mean
    assert found["fidelity"]["velocity_error"] == 0.25
    assert found["fidelity"]["psnr"] > found["fidelity"]["teacher_psnr_other_seed"] + 2  # the noise is shared
    assert found["param_ratio"] == 0.6
    assert found["fid_ratio"] == found["student"]["fid"] / found["teacher"]["fid"]
    for name in ("clip_score", "retrieval_at_1", "retrieval_at_5"):
        expected = 100 * (1 - found["student"][name] / found["teacher"][name])
        assert found["average_drop_per_metric"][name] == pytest.approx(expected)
        values = found["teacher_spread"][name]["values"]
        assert values[0] == found["teacher"][name]
        assert found["teacher_spread"][name]["mean"] == pytest.approx(np.mean(values))
        assert found["teacher_spread"][name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["average_drop"] == pytest.approx(np.mean(list(found["average_drop_per_metric"].values())))
    assert found["average_drop"] > 0
    for side in ("teacher", "student"):
        assert found[side]["latency_end_to_end_ms"] > 0
    assert found["speedup"] == found["teacher"]["latency_ms"] / found["student"]["latency_ms"]


def test_repeated_and_resumed_runs_are_identical(tmp_path: Path) -> None:
    first = run(tmp_path)
    (tmp_path / "teacher" / "seed-6" / "0003.png").unlink()
    (tmp_path / "metrics.json").unlink()
    pipelines = (BlockPipeline(), BlockPipeline(25.0))
    again = run(tmp_path, pipelines=pipelines)
    assert untimed(again) == untimed(first)
    timed = 1 + 2 + 1  # warm-up, two timed runs, one for memory
    swept = (1 + 4) * 2 * timed  # batches of 1 and 4, at two step counts
    assert pipelines[0].drawn == 5 + timed + swept
    assert pipelines[1].drawn == timed + swept
    assert untimed(run(tmp_path / "elsewhere")) == untimed(first)


def test_without_references_fid_is_against_the_teachers_second_seed(tmp_path: Path) -> None:
    found = run(tmp_path, references=None)
    describe = BlockExtractor().image_features
    first, second, third = (describe(images_of(tmp_path / "teacher" / f"seed-{s}")) for s in (5, 6, 7))
    assert found["fid_reference"] == "teacher"
    assert found["samples"]["references"] == 0
    assert found["teacher"]["fid"] == fid(first, second)
    # the reference itself is no sample of the spread: its distance to itself is 0
    assert found["teacher_spread"]["fid"]["values"] == [fid(first, second), fid(third, second)]


def test_one_teacher_seed_and_no_references_leave_fid_empty(tmp_path: Path) -> None:
    found = run(tmp_path, references=None, settings={"teacher_seeds": 1})
    assert found["fid_reference"] is None
    assert found["teacher"]["fid"] is found["student"]["fid"] is found["fid_ratio"] is None
    assert found["teacher_spread"]["fid"] == {"mean": None, "std": None, "values": []}
    assert found["teacher_spread"]["clip_score"]["std"] is None
    assert found["fidelity"]["teacher_psnr_other_seed"] is None
    assert found["average_drop"] is not None


def test_without_a_text_tower_the_caption_scores_are_empty(tmp_path: Path) -> None:
    found = run(tmp_path, extractor=BlockExtractor(text_tower=False))
    assert found["teacher"]["clip_score"] is found["student"]["retrieval_at_5"] is None
    assert found["average_drop"] is None
    assert found["fid_ratio"] is not None


def test_an_identical_student_loses_nothing(tmp_path: Path) -> None:
    found = run(tmp_path, error=0.0)
    assert found["average_drop"] == 0
    assert found["fid_ratio"] == 1
    assert (found["fidelity"]["psnr"], found["fidelity"]["ssim"]) == (100, pytest.approx(1))


def test_pictures_of_other_weights_are_refused(tmp_path: Path) -> None:
    run(tmp_path, models=("teacher-1", "student-1"))
    with pytest.raises(UserError, match="student/seed-5 holds pictures of other settings"):
        run(tmp_path, models=("teacher-1", "student-2"))


def test_bad_references_and_velocity(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2 pictures"):
        run(tmp_path, references=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    found = run(tmp_path, velocity_error=math.nan)
    assert found["fidelity"]["velocity_error"] is None
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_an_argument_without_effect_is_warned_about_once_a_pipeline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, call_kwargs={"true_cfg_scale": 4.0})
    assert caplog.text.count("does not take true_cfg_scale") == 2


def test_average_drop_leaves_undefined_scores_out() -> None:
    teacher = {"clip_score": 20.0, "retrieval_at_1": 0.0, "retrieval_at_5": 0.5}
    student = {"clip_score": 18.0, "retrieval_at_1": 0.1, "retrieval_at_5": 0.6}
    drop, per_metric = average_drop(teacher, student)
    assert per_metric == {
        "clip_score": pytest.approx(10),
        "retrieval_at_1": None,
        "retrieval_at_5": pytest.approx(-20),
    }
    assert drop == pytest.approx(-5)


def test_spread_and_finite() -> None:
    names = ("fid", "kid", "clip_score", "retrieval_at_1", "retrieval_at_5")
    found = spread([dict.fromkeys(names, 1.0), dict.fromkeys(names, 3.0), dict.fromkeys(names)])
    assert found["fid"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert finite({"a": [math.inf, 1.0], "b": {"c": math.nan}}) == {"a": [None, 1.0], "b": {"c": None}}
