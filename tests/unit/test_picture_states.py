"""States of noised pictures: the pipeline's own arithmetic, its own steps, the teacher's own answers."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))
from tiny_models import shared_pipeline
from tiny_pipelines import PIPELINES

from ppcl.capture.pictures import capture_pictures, image_to_image, picture_sizes, record_noised
from ppcl.capture.states import States
from ppcl.capture.trajectories import record_calls
from ppcl.common.streams import seeds
from ppcl.config import CaptureConfig
from ppcl.errors import ModelError, UserError
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call, velocity

SETTINGS = {"num_prompts": 20, "batch_size": 4, "num_inference_steps": 4, "states_per_prompt": 2}
SETTINGS |= {"held_out_share": 0.25, "height": 32, "width": 32, "guidance_scale": 2.0}
SHAPES = [(40, 40), (20, 40), (60, 30)]  # three ratios
CAPTIONS = ["red cat", "boat", "old house", "tiny tiny cat"]


def a_picture(number: int, shape: tuple[int, int]) -> Image.Image:
    noise = torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good samples of four captions and three shapes, and some that are not."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(12):
        a_picture(number, SHAPES[number % 3]).save(folder / f"{number}.png")
        rows.append(
            {"file_name": f"{number}.png", "text": ["red cat", "boat", "old house", "tiny tiny cat"][number % 4]}
        )
    (folder / "junk.png").write_bytes(b"junk")
    rows += [{"file_name": "junk.png", "text": "red cat"}, {"file_name": "0.png", "text": ""}]
    lines = [*map(json.dumps, rows), "{"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def calibration(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    capture_pictures(shared_pipeline(), folder, CaptureConfig(**SETTINGS, data=str(data)), 0, [])
    return folder


def time_of(call: Call) -> float:
    return float(next(v for k, v in call.arguments.items() if k in ("timestep", "t"))[0])


def tiny(family: str) -> Any:
    pipeline = PIPELINES[family]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", ["qwen", "flux", "sd3_without_t5", "z_image"])
def test_every_step_of_the_sampler_can_be_asked_for(family: str) -> None:
    pipeline = shared_pipeline() if family == "qwen" else tiny(family)
    settings = CaptureConfig(**SETTINGS)
    drawn = [time_of(call) for call in record_calls(pipeline, ["a", "b"], list(seeds(0, 2)), settings)]
    times = list(dict.fromkeys(drawn))
    assert len(times) == settings.num_inference_steps
    sibling = image_to_image(pipeline)
    pictures = [a_picture(n, (32, 32)) for n in range(2)]
    for step, expected in enumerate(times):
        calls = record_noised(sibling, ["a", "b"], pictures, step, list(seeds(1, 2)), settings)
        assert [time_of(call) for call in calls] == [expected] * drawn.count(expected)
    # and the pipeline still draws what it drew before
    again = [time_of(call) for call in record_calls(pipeline, ["a", "b"], list(seeds(0, 2)), settings)]
    assert again == drawn


def test_a_state_is_the_encoded_picture_and_noise_in_the_schedulers_shares() -> None:
    """x = (1 - s) x_0 + s e, with the x_0 of the VAE and each picture's own noise."""
    from diffusers.image_processor import VaeImageProcessor

    pipeline = tiny("sd3_without_t5")
    settings = CaptureConfig(**{**SETTINGS, "guidance_scale": 1.0})
    pictures = [a_picture(n, (32, 32)) for n in range(2)]
    (call,) = record_noised(image_to_image(pipeline), ["a", "b"], pictures, 2, list(seeds(5, 2)), settings)
    vae = pipeline.vae
    pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(pictures, height=32, width=32)
    for row, generator in enumerate(seeds(5, 2)):
        clean = vae.encode(pixels[row : row + 1]).latent_dist.sample(generator)
        clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        share = time_of(call) / 1000
        expected = (1 - share) * clean + share * noise
        assert torch.allclose(call.arguments["hidden_states"][row : row + 1], expected, atol=1e-5)


def states_of(folder: Path) -> list[Call]:
    return [call for split in ("train", "held-out") for call in States(folder, split).calls]


def test_the_teacher_answers_where_the_pictures_are(calibration: Path) -> None:
    transformer = shared_pipeline().transformer
    with torch.no_grad():
        for call in states_of(calibration):
            assert torch.allclose(velocity(transformer, call.arguments), call.velocity, atol=1e-5)


def test_every_picture_gets_its_states_and_every_shape_its_group(calibration: Path) -> None:
    calls = states_of(calibration)
    assert sum(trees.batch_size(call.arguments) for call in calls) == 12 * SETTINGS["states_per_prompt"]
    sizes = picture_sizes(shared_pipeline(), CaptureConfig(**SETTINGS))
    assert (32, 32) in sizes and len(sizes) >= 3
    assert len({call.arguments["hidden_states"].shape[1] for call in calls}) >= 2  # tokens of different sizes
    assert len({time_of(call) for call in calls}) == SETTINGS["num_inference_steps"]


def test_every_state_keeps_its_caption(data: Path, tmp_path: Path) -> None:
    """Steps take some of a file's pictures, and stored calls some of a step's; captions of one text are one prompt."""
    settings = {**SETTINGS, "guidance_scale": 1.0, "held_out_share": 0.5, "states_per_prompt": 4}
    capture_pictures(shared_pipeline(), tmp_path, CaptureConfig(**settings, data=str(data)), 0, [])
    for split in ("train", "held-out"):
        states = States(tmp_path, split)
        texts: dict[str, set[bytes]] = {}
        for (call, row), mark in states.marks.items():
            text = states.calls[call].arguments["encoder_hidden_states"][row, -1]
            texts.setdefault(mark.prompt, set()).add(text.numpy().tobytes())
        assert len(texts) == 2
        one, other = texts.values()
        assert not one & other


def prompts_of(folder: Path, split: str) -> set[str]:
    from ppcl.common.tensor_files import read_tensors

    found: set[str] = set()
    for path in folder.glob(f"{split}-*.safetensors"):
        found |= set(read_tensors(path)[1]["prompts"])
    return found


def test_pictures_of_one_caption_are_on_one_side_of_the_split(calibration: Path) -> None:
    train, held_out = (prompts_of(calibration, split) for split in ("train", "held-out"))
    assert (len(train), len(held_out)) == (3, 1)
    assert not train & held_out


def test_what_was_left_out_is_listed(calibration: Path) -> None:
    rows = [json.loads(line) for line in (calibration / "skipped.jsonl").read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in rows} == {
        "metadata.jsonl:15": "bad caption line",
        "junk.png": "corrupt picture",
        "0.png": "empty caption",
    }


def test_capture_is_resumed_with_identical_bytes(calibration: Path, data: Path, tmp_path: Path) -> None:
    original = {path.name: path.read_bytes() for path in calibration.iterdir()}
    for name, content in original.items():
        if name != "train-0000.safetensors":
            (tmp_path / name).write_bytes(content)
    capture_pictures(shared_pipeline(), tmp_path, CaptureConfig(**SETTINGS, data=str(data)), 0, [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == original


def test_files_of_an_attempt_with_other_samples_do_not_stay(calibration: Path, data: Path, tmp_path: Path) -> None:
    for folder, source in ((tmp_path / "data", data), (tmp_path / "out", calibration)):
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "5.png").unlink()
    settings = CaptureConfig(**SETTINGS, data=str(tmp_path / "data"))
    for out in (tmp_path / "out", tmp_path / "fresh"):
        capture_pictures(shared_pipeline(), out, settings, 0, [])
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "fresh")]
    assert files[0] == files[1]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_both_branches_of_guidance_are_recorded(scale: float, tmp_path: Path) -> None:
    """SD3 joins them in one call of twice the batch, the ones without prompt first."""
    pipeline = tiny("sd3_without_t5")
    for number in range(8):
        a_picture(number, (32, 32)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"cat {number}")
    changes = {"guidance_scale": scale, "aspect_ratios": ("1:1",), "data": str(tmp_path), "batch_size": 8}
    capture_pictures(pipeline, tmp_path / "out", CaptureConfig(**{**SETTINGS, **changes}), 0, [])
    texts: list[Tensor] = []
    for call in states_of(tmp_path / "out"):
        texts += list(call.arguments["pooled_projections"])
    unlike = {tuple(text.tolist()) for text in texts}
    empty = max(sum(torch.equal(a, b) for b in texts) for a in texts)
    assert len(texts) == 16
    assert (len(unlike), empty <= 2) == (8, True) if scale == 1 else empty >= 6


@pytest.mark.parametrize("family", ["pixart", "wan"])
def test_families_that_cannot_noise_pictures_say_so(family: str) -> None:
    with pytest.raises(ModelError, match=r"has no image-to-image sibling .* set capture.data=prompts") as caught:
        image_to_image(tiny(family))
    assert "\n" not in str(caught.value)


def test_no_usable_sample(tmp_path: Path, data: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, content in (("a.png", b"junk"), ("a.txt", b"a cat"), ("b.png", b""), ("b.txt", b"")):
        (tmp_path / "data" / name).write_bytes(content)
    out = tmp_path / "out"
    settings = CaptureConfig(**SETTINGS, data=str(tmp_path / "data"))
    says = r"0 usable samples .*left out: 1 corrupt picture, 1 empty caption \(.*skipped.jsonl; a.png: it is none"
    with pytest.raises(UserError, match=says) as caught:
        capture_pictures(shared_pipeline(), out, settings, 0, [])
    assert "\n" not in str(caught.value)
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 2
    kept_for_evaluation = ["red cat", "boat", "old house"]
    with pytest.raises(UserError, match="with 1 different captions, at least 2 are needed"):
        capture_pictures(shared_pipeline(), out, CaptureConfig(**SETTINGS, data=str(data)), 0, kept_for_evaluation)


def test_a_size_that_the_pipeline_refuses(data: Path, tmp_path: Path) -> None:
    settings = CaptureConfig(**{**SETTINGS, "height": 64, "width": 64}, data=str(data), aspect_ratios=("2:1",))
    with pytest.raises(UserError, match=r"cannot be greater than .*; set capture.aspect_ratios, .* \d+x\d+"):
        capture_pictures(tiny("sd3_without_t5"), tmp_path, settings, 0, [])


def test_a_picture_that_goes_away_in_between(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ppcl.capture.pictures as module

    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    choose = module.choose_samples

    def choose_and_lose(*arguments: Any) -> Any:
        found = choose(*arguments)
        (folder / "3.png").unlink()
        return found

    monkeypatch.setattr(module, "choose_samples", choose_and_lose)
    caplog.set_level(logging.WARNING)
    capture_pictures(shared_pipeline(), tmp_path / "out", CaptureConfig(**SETTINGS, data=str(folder)), 0, [])
    assert "missing picture" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert sum(trees.batch_size(call.arguments) for call in states_of(tmp_path / "out")) == 11 * 2
    assert "12 samples are used; left out: 1 bad caption line, 1 corrupt picture" in caplog.text
