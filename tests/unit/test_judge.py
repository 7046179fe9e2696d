"""The judge with a teacher of noise, a student that is nearly it, and hand-made features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_file import load_images
from PIL import Image
from torch import Tensor, nn

from ppcl.config import load_config
from ppcl.errors import UserError
from ppcl.eval.fid import fid
from ppcl.eval.fidelity import psnr, ssim
from ppcl.eval.judge import Entrant, Judge, judge_all
from ppcl.eval.results import Evaluation, finite, load_evaluation, save_evaluation, spread_of
from ppcl.eval.scoring import reference_of
from ppcl.eval.set_distances import kid

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
        self.unet = nn.Linear(10 if error else 20, 1, bias=False)
        self.device = torch.device("cpu")

    def __call__(
        self, prompt: list[str], generator: list[torch.Generator], num_inference_steps: int, output_type: str = "pil"
    ) -> SimpleNamespace:
        self.unet(torch.zeros(1, self.unet.in_features))
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


def run(folder: Path, error: float = 25.0, **changes: Any) -> Evaluation:
    """Judge a teacher and a student; write the numbers beside the pictures."""
    settings = {"num_inference_steps": 2, "batch_size": 5, "teacher_seeds": 3, "latency_runs": 2}
    overrides = [f"evaluate.{name}={value}" for name, value in {**settings, **changes.get("settings", {})}.items()]
    config = load_config([], ["seed=5", *overrides])
    extractor = changes.get("extractor") or BlockExtractor()
    real = changes.get("references", REAL)
    reference = (reference_of(extractor.image_features(real)), "real pictures") if real is not None else None
    judge = Judge(folder, PROMPTS, config, extractor, reference)
    pipelines = changes.get("pipelines") or (BlockPipeline(), BlockPipeline(error))
    identities = changes.get("models", ("teacher", "student"))
    labels = ("teacher", "student")
    entrants = [
        Entrant(label, label, identity, lambda p=pipeline: p)
        for label, identity, pipeline in zip(labels, identities, pipelines, strict=True)
    ]
    result = judge_all(judge, entrants)
    save_evaluation(result, folder)
    return result


REAL = torch.randint(0, 256, (20, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator())


def untimed(value: Any) -> Any:
    if isinstance(value, list):
        return [untimed(entry) for entry in value]
    if isinstance(value, dict):
        times = {"verdict", *TIMINGS}
        return {k: untimed(v) for k, v in value.items() if k not in times and not k.startswith("speedup")}
    return value


def images_of(folder: Path) -> Tensor:
    return load_images(sorted(folder.glob("*.png")))


def test_metrics_file_and_its_numbers(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert load_evaluation(tmp_path / "metrics.json") == result
    assert (result.schema_version, result.features, result.num_inference_steps) == (2, "blocks", 2)
    assert (result.prompts, result.reference, result.reference_count) == (12, "real pictures", 20)
    assert sorted(p.name for p in (tmp_path / "teacher").iterdir()) == ["seed-5", "seed-6", "seed-7"]
    assert sorted(p.name for p in (tmp_path / "student").iterdir()) == ["again-6", "seed-5"]
    first, second = images_of(tmp_path / "teacher" / "seed-5"), images_of(tmp_path / "student" / "seed-5")
    describe = BlockExtractor().image_features
    teacher, student = result.models
    (row,) = result.comparisons
    assert teacher.numbers["fid"].value == pytest.approx(fid(describe(first), describe(REAL)))
    assert student.numbers["kid"].value == pytest.approx(kid(describe(second), describe(REAL)))
    assert row.fidelity["psnr"].value == pytest.approx(psnr(first, second).mean)
    cosine = F.cosine_similarity(describe(first).double(), describe(second).double())
    assert row.fidelity["feature_cosine"].value == pytest.approx(float(cosine.mean()))
    assert row.fidelity["psnr"].value > row.scale["psnr"] + 2  # the noise is shared
    assert row.param_ratio == 0.5
    assert row.fid_ratio is not None
    assert row.fid_ratio.value == pytest.approx(student.numbers["fid"].value / teacher.numbers["fid"].value)
    likeness = ssim(first, images_of(tmp_path / "teacher" / "seed-6")).mean
    assert teacher.numbers["diversity"].value == pytest.approx(1 - likeness)
    again = images_of(tmp_path / "student" / "again-6")
    assert student.numbers["diversity"].value == pytest.approx(1 - ssim(second, again).mean)
    assert row.diversity_ratio is not None
    assert row.diversity_ratio.value == pytest.approx(student.numbers["diversity"].value / (1 - likeness))
    for name in ("clip_score", "retrieval_at_1", "retrieval_at_5"):
        expected = 100 * (1 - student.numbers[name].value / teacher.numbers[name].value)
        assert row.average_drop_per_score[name].value == pytest.approx(expected)
        spread = teacher.spread[name]
        assert spread.values[0] == teacher.numbers[name].value
        assert spread.mean == pytest.approx(np.mean(spread.values))
        assert spread.std == pytest.approx(np.std(spread.values, ddof=1))
    assert row.average_drop is not None
    assert row.average_drop.value == pytest.approx(np.mean([n.value for n in row.average_drop_per_score.values()]))
    assert row.average_drop.value > 0
    for model in result.models:
        assert (model.costs["latency_end_to_end_ms"] or 0) > 0
    assert row.speedup == (teacher.costs["latency_ms"] or 0) / (student.costs["latency_ms"] or 1)


def test_repeated_and_resumed_runs_are_identical(tmp_path: Path) -> None:
    first = run(tmp_path).model_dump()
    (tmp_path / "teacher" / "seed-6" / "0003.png").unlink()
    (tmp_path / "metrics.json").unlink()
    again = run(tmp_path).model_dump()
    assert untimed(again) == untimed(first)
    assert untimed(run(tmp_path / "elsewhere").model_dump()) == untimed(first)


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    """Beyond one lost batch nothing is drawn but what is timed."""
    run(tmp_path)
    (tmp_path / "teacher" / "seed-6" / "0003.png").unlink()
    teacher, student = BlockPipeline(), BlockPipeline(25.0)
    run(tmp_path, pipelines=(teacher, student))
    assert teacher.drawn == student.drawn + 5


def test_without_references_fid_is_against_the_teachers_second_seed(tmp_path: Path) -> None:
    result = run(tmp_path, references=None)
    describe = BlockExtractor().image_features
    first, second, third = (describe(images_of(tmp_path / "teacher" / f"seed-{s}")) for s in (5, 6, 7))
    assert result.reference == "pictures of teacher with another seed"
    teacher = result.models[0]
    assert teacher.numbers["fid"].value == pytest.approx(fid(first, second))
    # the reference itself is no sample of the spread: its distance to itself is 0
    assert teacher.spread["fid"].values == pytest.approx([fid(first, second), fid(third, second)])


def test_one_teacher_seed_and_no_references_leave_fid_empty(tmp_path: Path) -> None:
    result = run(tmp_path, references=None, settings={"teacher_seeds": 1})
    assert result.reference is None
    assert any("FID is left out" in note for note in result.notes)
    teacher, student = result.models
    (row,) = result.comparisons
    assert "fid" not in teacher.numbers
    assert "fid" not in student.numbers
    assert row.fid_ratio is None
    assert teacher.spread == {}
    assert row.scale == {}
    assert row.average_drop is not None


def test_without_a_text_tower_the_caption_scores_are_empty(tmp_path: Path) -> None:
    result = run(tmp_path, extractor=BlockExtractor(text_tower=False))
    assert {"clip_score", "retrieval_at_5"}.isdisjoint(result.models[1].numbers)
    assert result.comparisons[0].average_drop is None
    assert result.comparisons[0].fid_ratio is not None


def test_an_identical_student_loses_nothing(tmp_path: Path) -> None:
    (row,) = run(tmp_path, error=0.0).comparisons
    assert row.average_drop is not None
    assert row.average_drop.value == 0
    assert row.fid_ratio is not None
    assert row.fid_ratio.value == 1
    assert (row.fidelity["psnr"].value, row.fidelity["ssim"].value) == (100, pytest.approx(1))


def test_pictures_of_other_weights_are_refused(tmp_path: Path) -> None:
    run(tmp_path, models=("teacher-1", "student-1"))
    with pytest.raises(UserError, match="student/seed-5 holds pictures of other settings"):
        run(tmp_path, models=("teacher-1", "student-2"))


def test_one_reference_picture_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        reference_of(BlockExtractor().image_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))


def test_spread_and_finite() -> None:
    spread = spread_of([1.0, 3.0])
    assert (spread.mean, spread.std, spread.values) == (2.0, pytest.approx(2**0.5), [1.0, 3.0])
    assert spread_of([1.0]).std is None
    assert finite({"a": [math.inf, 1.0], "b": {"c": math.nan}}) == {"a": [None, 1.0], "b": {"c": None}}


class OnePicturePipeline(BlockPipeline):
    """Draws a prompt in one way, whatever the noise."""

    def __call__(self, prompt: Any, **arguments: Any) -> Any:
        arguments["generator"] = [torch.Generator().manual_seed(0) for _ in arguments["generator"]]
        return super().__call__(prompt, **arguments)


def test_a_student_that_collapses_shows(tmp_path: Path) -> None:
    row = run(tmp_path, pipelines=(BlockPipeline(), OnePicturePipeline())).comparisons[0]
    assert row.diversity_ratio is not None and row.diversity_ratio.value == pytest.approx(0, abs=1e-6)


def test_diversity_is_drawn_of_so_many_prompts_and_can_be_left_out(tmp_path: Path) -> None:
    result = run(tmp_path / "few", settings={"teacher_seeds": 1, "diversity_prompts": 3})
    assert len(list((tmp_path / "few" / "teacher" / "again-6").glob("*.png"))) == 3
    assert result.models[0].numbers["diversity"].count == 3
    without = run(tmp_path / "none", settings={"diversity_prompts": 0})
    assert "diversity" not in without.models[0].numbers
    assert without.comparisons[0].diversity_ratio is None
    assert not list((tmp_path / "none" / "student").glob("again-*"))


def test_the_floor_is_what_real_pictures_have_to_each_other(tmp_path: Path) -> None:
    assert run(tmp_path / "few").floor == {}  # 20 real pictures are not twice the 12 that are drawn
    more = torch.cat([REAL, 255 - REAL])
    floor = run(tmp_path / "more", references=more).floor
    assert set(floor) == {"fid", "kid", "cmmd"}
    assert 0 < floor["fid"] < run(tmp_path / "other", references=more // 8).models[0].numbers["fid"].value


def test_for_scale_are_the_same_numbers_of_another_seed(tmp_path: Path) -> None:
    row = run(tmp_path).comparisons[0]
    assert row.scale.keys() == row.fidelity.keys() - {"velocity_error"}
    first, other = images_of(tmp_path / "teacher" / "seed-5"), images_of(tmp_path / "teacher" / "seed-6")
    assert row.scale["psnr"] == pytest.approx(psnr(first, other).mean)
    assert row.scale["ssim"] == pytest.approx(ssim(first, other).mean)
    assert row.scale["texture_distance"] > 0
