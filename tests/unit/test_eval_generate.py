"""Drawing pictures resumably, with a pipeline of noise; reading them back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_file import load_images
from PIL import Image

from ppcl.errors import ArtifactError, UserError
from ppcl.eval.generate import generate, picture_generator, read_picture

PROMPTS = [f"picture number {i}" for i in range(7)]
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "num_inference_steps": 4,
    "batch_size": 3,
    "call_kwargs": {"height": 16, "width": 12, "negative_prompt": " "},
    "label": "test",
}


class NoisePipeline:
    """Draws the generators' noise; like a real model, its last bits depend on the batch's other prompts.

    Args:
        fail_at: Number of the call that is interrupted (Control-C), counted from 0.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.fail_at = fail_at

    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        num_inference_steps: int = 50,
        height: int = 8,
        width: int = 8,
        negative_prompt: list[str] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append({"prompt": prompt, "steps": num_inference_steps, "negative_prompt": negative_prompt})
        neighbours = sum(map(len, prompt)) % 5
        images = []
        for one in generator:
            noise = torch.randint(0, 250, (height, width, 3), generator=one)
            images.append(Image.fromarray((noise + neighbours).to(torch.uint8).numpy()))
        assert output_type == "pil"
        return SimpleNamespace(images=images)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_png_a_prompt_and_the_settings(tmp_path: Path) -> None:
    pipeline = NoisePipeline()
    paths = generate(pipeline, PROMPTS, tmp_path / "out", **SETTINGS)
    assert [path.name for path in paths] == [f"{i:04d}.png" for i in range(7)]
    assert sorted(contents(tmp_path / "out")) == [*(path.name for path in paths), "prompts.json"]
    assert [call["prompt"] for call in pipeline.calls] == [PROMPTS[:3], PROMPTS[3:6], PROMPTS[6:]]
    assert pipeline.calls[0]["steps"] == 4
    assert pipeline.calls[2]["negative_prompt"] == [" "]
    written = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert (written["prompts"], written["seed"], written["num_inference_steps"]) == (PROMPTS, 3, 4)
    assert written["kwargs"]["width"] == 12
    assert load_images(paths).shape == (7, 3, 16, 12)


def test_finished_folder_is_kept(tmp_path: Path) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path, **SETTINGS)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    again = NoisePipeline()
    generate(again, PROMPTS, tmp_path, **SETTINGS)
    assert again.calls == []
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times


def test_deleted_and_truncated_pictures_come_back_bit_by_bit(tmp_path: Path) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path, **SETTINGS)
    before = contents(tmp_path)
    (tmp_path / "0001.png").unlink()
    broken = tmp_path / "0005.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    again = NoisePipeline()
    generate(again, PROMPTS, tmp_path, **SETTINGS)
    assert [call["prompt"] for call in again.calls] == [PROMPTS[:3], PROMPTS[3:6]]  # whole batches, not the last
    assert contents(tmp_path) == before


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, fail_at: int) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path / "whole", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        generate(NoisePipeline(fail_at), PROMPTS, tmp_path / "halves", **SETTINGS)
    assert len(list((tmp_path / "halves").glob("*.png"))) == 3 * fail_at
    generate(NoisePipeline(), PROMPTS, tmp_path / "halves", **SETTINGS)
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_killed_between_two_pictures_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path / "whole", **SETTINGS)
    saved: list[str] = []
    save = Image.Image.save

    def dies(self: Image.Image, path: Any, **kwargs: Any) -> None:
        save(self, path, **kwargs)
        saved.append(str(path))
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(NoisePipeline(), PROMPTS, tmp_path / "halves", **SETTINGS)
    monkeypatch.undo()
    assert sorted(contents(tmp_path / "halves")) == [*(f"{i:04d}.png" for i in range(4)), "prompts.json"]
    generate(NoisePipeline(), PROMPTS, tmp_path / "halves", **SETTINGS)
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_noise_depends_on_seed_and_index_alone() -> None:
    def noise(seed: int, index: int) -> list[float]:
        return torch.randn(4, generator=picture_generator(seed, index)).tolist()

    assert noise(0, 1) == noise(0, 1)
    every = {tuple(noise(seed, index)) for seed in range(5) for index in range(50)}
    assert len(every) == 250


def test_batch_size_does_not_change_the_noise(tmp_path: Path) -> None:
    for batch in (1, 7):
        generate(NoisePipeline(), PROMPTS, tmp_path / str(batch), **{**SETTINGS, "batch_size": batch})
    one, seven = (load_images(sorted((tmp_path / str(b)).glob("*.png"))).int() for b in (1, 7))
    assert (one - seven).abs().max() < 5  # the pipeline's neighbour term, nothing else


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "seed"),
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"call_kwargs": {"height": 16, "width": 16}}, "kwargs"),
        ({"model": "abc"}, "model"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path, **SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"other settings \(different: {said}\)"):
        generate(NoisePipeline(), PROMPTS, tmp_path, **{**SETTINGS, **change})
    with pytest.raises(UserError, match="different: prompts"):
        generate(NoisePipeline(), PROMPTS[:-1], tmp_path, **SETTINGS)
    assert contents(tmp_path) == before


def test_pictures_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0000.png")
    with pytest.raises(UserError, match=r"no prompts\.json"):
        generate(NoisePipeline(), PROMPTS, tmp_path, **SETTINGS)


def test_arguments_the_pipeline_does_not_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"height": 16, "width": None, "true_cfg_scale": 4.0}
    with caplog.at_level(logging.WARNING):
        paths = generate(NoisePipeline(), PROMPTS, tmp_path, **{**SETTINGS, "call_kwargs": kwargs})
    assert "NoisePipeline does not take true_cfg_scale" in caplog.text
    assert load_images(paths).shape == (7, 3, 16, 8)  # the width is the pipeline's default


def test_the_pipelines_own_bar_is_quiet_only_while_drawing(tmp_path: Path) -> None:
    class WithBar(NoisePipeline):
        def __init__(self) -> None:
            super().__init__()
            self._progress_bar_config: dict[str, Any] = {"leave": False}
            self.seen: list[dict[str, Any]] = []

        def set_progress_bar_config(self, **kwargs: Any) -> None:
            self._progress_bar_config = kwargs
            self.seen.append(kwargs)

    pipeline = WithBar()
    generate(pipeline, PROMPTS, tmp_path, **SETTINGS)
    assert pipeline.seen == [{"leave": False, "disable": True}, {"leave": False}]


def test_the_middle_frame_stands_for_a_video(tmp_path: Path) -> None:
    class Video(NoisePipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            pictures = super().__call__(*args, **kwargs).images
            return SimpleNamespace(frames=[[Image.new("RGB", one.size)] * 2 + [one] * 3 for one in pictures])

    generate(Video(), PROMPTS, tmp_path / "video", **SETTINGS)
    generate(NoisePipeline(), PROMPTS, tmp_path / "picture", **SETTINGS)
    assert contents(tmp_path / "video") == contents(tmp_path / "picture")


def test_wrong_output_and_lack_of_memory_are_user_errors(tmp_path: Path) -> None:
    class Video(NoisePipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(frames=[])

    class Full(NoisePipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match="no list of pictures for 3 prompts"):
        generate(Video(), PROMPTS, tmp_path / "video", **SETTINGS)
    with pytest.raises(UserError, match=r"lower evaluate\.batch_size"):
        generate(Full(), PROMPTS, tmp_path / "full", **SETTINGS)
    with pytest.raises(UserError, match="nothing to draw"):
        generate(NoisePipeline(), [], tmp_path / "empty", **SETTINGS)


def test_pictures_are_read_on_white(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.fromarray(np.full((2, 2), 257 * 77, np.uint16)).save(tmp_path / "grey16.png")
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 255)).convert("P").save(tmp_path / "palette.png")
    names = ("grey", "grey16", "clear", "palette")
    images = load_images([tmp_path / f"{name}.png" for name in names])
    assert images.dtype == torch.uint8
    assert images[:, :, 0, 0].tolist() == [[77] * 3, [77] * 3, [255] * 3, [255, 0, 0]]


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with pytest.raises(ArtifactError, match=r"bad\.png cannot be used \(missing picture\)"):
        read_picture(bad)
    Image.fromarray(noise).save(bad)
    whole = bad.read_bytes()
    for kept in (2000, 20, 0):
        bad.write_bytes(whole[:kept])
        with pytest.raises(ArtifactError, match=r"bad\.png cannot be used \(corrupt picture"):
            read_picture(bad)
