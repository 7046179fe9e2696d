"""Pipelines are asked how they are called: what turns guidance off, which pictures they take, what went wrong."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))
import tiny_pipelines
from tiny_models import shared_pipeline

from ppcl.capture.pictures import check_data, image_to_image, record_noised
from ppcl.capture.prompts import pictured_prompts
from ppcl.capture.states import States, guidance_branches
from ppcl.capture.trajectories import capture, check_teacher, record_calls
from ppcl.common.streams import seeds
from ppcl.config import CaptureConfig, load_config
from ppcl.errors import ModelError, UserError
from ppcl.eval.generate import draw
from ppcl.eval.models import evaluation_prompts
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import ADAPTERS
from ppcl.teacher.pipeline_call import (
    PicturedPrompt,
    call_parameters,
    check_call,
    check_guidance,
    guidance_arguments,
    guidance_of,
    guidance_weight,
    needs_of,
    picture_arguments,
)

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
PROMPTS = ["red cat", "old house"]


def small(**changes: Any) -> CaptureConfig:
    return CaptureConfig(**{**SMALL, **changes})


def tiny(name: str, **parts: Any) -> Any:
    torch.manual_seed(0)
    pipeline = getattr(tiny_pipelines, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def families() -> list[Any]:
    """Every pipeline of diffusers whose transformer ppcl knows, and that the installed transformers lets it import."""
    found = []
    for name in sorted(name for name in dir(diffusers) if name.endswith("Pipeline") and name != "DiffusionPipeline"):
        try:
            kind = getattr(diffusers, name)
        except RuntimeError:  # of models that are newer than the oldest transformers
            continue
        if not (isinstance(kind, type) and "transformer" in inspect.signature(kind.__init__).parameters):
            continue
        annotation = str(inspect.signature(kind.__init__).parameters["transformer"].annotation)
        if any(family in annotation for family in ADAPTERS):
            found.append(kind)
    return found


# --- guidance ---


@pytest.mark.parametrize("kind", families(), ids=lambda kind: kind.__name__)
def test_one_or_less_asks_no_pipeline_twice(kind: Any) -> None:
    for asked in (0.0, 1.0):
        guidance = guidance_of(kind, {}, {"is_distilled": False}, asked)
        rule = getattr(kind, "do_classifier_free_guidance", None)
        assert not (guidance.argument and guidance.doubles)
        if isinstance(rule, property) and guidance.argument == "guidance_scale" and "_guidance_scale >" in _body(rule):
            pipeline = type("Stub", (), {"_guidance_scale": guidance.scale, "guidance_scale": guidance.scale})()
            pipeline.config = type("Config", (), {"is_distilled": False})()
            pipeline._audio_guidance_scale = 0.0
            assert not rule.fget(pipeline)  # type: ignore[misc]


def _body(rule: property) -> str:
    return inspect.getsource(rule.fget)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ZImagePipeline", "Krea2Pipeline"])
def test_families_that_count_from_nought_get_nought(name: str) -> None:
    kind = getattr(diffusers, name)
    assert guidance_of(kind, {}, {}, 1.0).scale == 0
    assert guidance_of(kind, {}, {}, 1.5).scale == 1.5
    assert guidance_of(diffusers.WanPipeline, {}, {}, 0.0).scale == 1


def test_the_weight_of_guidance_counts_from_one_in_every_family() -> None:
    z_image, sd3 = tiny("z_image"), tiny("sd3")
    assert guidance_weight(z_image, small(guidance_scale=2.0)) == 3.0  # v_c + 2 (v_c - v_u)
    assert guidance_weight(sd3, small(guidance_scale=2.0)) == 2.0
    assert (
        guidance_weight(sd3, small(guidance_scale=1.0)) is guidance_weight(z_image, small(guidance_scale=0.0)) is None
    )
    assert guidance_weight(sd3, small()) == call_parameters(sd3)["guidance_scale"].default


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, None])
def test_z_image_answers_once_where_guidance_is_off(scale: float | None) -> None:
    calls = record_calls(tiny("z_image"), PROMPTS, list(seeds(0, 2)), small(guidance_scale=scale))
    assert {batch_size(call.arguments) for call in calls} == {2 if scale in (0, 1) else 4}


def test_the_default_is_the_pipelines_own() -> None:
    schnell, dev = tiny("schnell"), tiny("flux")
    assert guidance_arguments(schnell, small()) == guidance_arguments(dev, small()) == {"height": 32, "width": 32}
    assert len(record_calls(schnell, PROMPTS, 0, small())) == 2  # one a step
    assert guidance_arguments(shared_pipeline(), small()) == {"height": 32, "width": 32, "negative_prompt": " "}
    assert guidance_arguments(dev, small(guidance_scale=2.0))["guidance_scale"] == 2


def test_teachers_of_few_steps_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    schnell, turbo = tiny("schnell"), tiny("z_image")
    check_teacher(schnell, small(), False)
    check_teacher(turbo, small(guidance_scale=4.0), False)
    assert not caplog.records
    check_teacher(schnell, small(guidance_scale=4.0), False)
    assert "made for drawing without guidance" in caplog.text and "capture.guidance_scale=0" in caplog.text
    caplog.clear()
    turbo.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    check_teacher(turbo, small(guidance_scale=1.0), False)
    assert not caplog.records
    check_teacher(turbo, small(), False)
    assert "made for drawing without guidance" in caplog.text
    caplog.clear()
    turbo.register_to_config(_name_or_path="elsewhere", is_distilled=True)  # as Krea 2 says it
    check_guidance(turbo, small())
    assert "made for drawing without guidance" in caplog.text


def test_what_the_first_calls_did_is_compared_with_what_was_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny("wan")
    monkeypatch.setattr(type(pipeline), "do_classifier_free_guidance", property(lambda _: True))
    settings = small(guidance_scale=0.0, batch_size=2, num_prompts=2, held_out_share=0.5, states_per_prompt=1)
    with caplog.at_level(logging.WARNING):
        capture(pipeline, PROMPTS, tmp_path, settings, 0)
    assert "asks its transformer twice a step at capture.guidance_scale=0" in caplog.text


# --- samplers ---


def test_a_sampler_of_two_calls_a_step_is_not_guidance() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipeline = tiny("wan")  # the others give the sampler their own sigmas, which Heun does not take
    euler = record_calls(pipeline, PROMPTS, 0, small(guidance_scale=3.0))
    assert guidance_branches([call.arguments for call in euler]) == [0, 1] * 2
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    for scale, branches in ((0.0, [0] * 5), (3.0, [0, 1] * 5)):
        calls = record_calls(pipeline, PROMPTS, 0, small(guidance_scale=scale, num_inference_steps=3))
        assert guidance_branches([call.arguments for call in calls]) == branches


def test_a_sampler_that_a_pipeline_cannot_use_is_one_line_with_its_cause() -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    from ppcl.emoji.components import assemble

    parts = shared_pipeline().components
    pipeline = assemble(parts["vae"], parts["tokenizer"], parts["text_encoder"], parts["transformer"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for call in (
        lambda: record_calls(pipeline, PROMPTS, 0, small(num_frames=None)),
        lambda: draw(pipeline, PROMPTS, list(seeds(0, 2)), 2, {"height": 32, "width": 32}),
    ):
        with pytest.raises(ModelError, match=r"with DPMSolver\w+ failed \(ValueError: .*custom sigmas.*\); ") as caught:
            call()
        assert "\n" not in str(caught.value)
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(ModelError, match=r"with UniPC\w+ failed .*scale_noise.* capture.data=prompts"):
        record_noised(image_to_image(pipeline), PROMPTS, [picture] * 2, 0, list(seeds(0, 2)), small())


def test_a_teacher_that_never_asks_its_transformer_is_refused() -> None:
    pipeline = tiny("wan_two_experts")
    pipeline.register_to_config(boundary_ratio=1.1)  # all steps are the other's
    with pytest.raises(ModelError, match="draws in 2 steps without its transformer"):
        record_calls(pipeline, PROMPTS, 0, small())


def test_another_transformer_is_said_to_stay(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_teacher(tiny("wan_two_experts"), small(), False)
    assert "has another transformer, transformer_2; only 'transformer' is compressed" in caplog.text


# --- pictures ---


def pictured(colour: int) -> PicturedPrompt:
    return PicturedPrompt("red cat", f"{colour}.png", lambda: Image.new("RGB", (40, 48), (colour, 90, 90)))


@pytest.mark.parametrize("name", sorted(tiny_pipelines.PICTURED))
def test_a_prompts_picture_reaches_the_transformer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pipelines.small_sources(monkeypatch)
    pipeline, settings = tiny(name), small()
    calls = [record_calls(pipeline, [pictured(colour)] * 2, 0, settings) for colour in (0, 0, 250)]
    assert len(calls[0]) % 2 == 0  # each prompt alone
    same, other = (torch.equal(calls[0][0].velocity, found[0].velocity) for found in calls[1:])
    assert same and not other


@pytest.mark.parametrize("name", ["flux_fill", "flux_control", "wan_image_to_video", "ltx_image_to_video"])
def test_a_teacher_that_needs_pictures_is_refused_without(name: str) -> None:
    with pytest.raises(ModelError, match=r"(takes|starts from) a picture .* set capture.data") as caught:
        record_calls(tiny(name), PROMPTS, 0, small())
    assert "\n" not in str(caught.value)


def test_kontext_is_not_calibrated_on_texts_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny("flux_kontext")
    with caplog.at_level(logging.WARNING):
        check_teacher(pipeline, small(), False)
    assert "also takes pictures (image), and none of its calibration will have one" in caplog.text
    (call, _) = record_calls(pipeline, PROMPTS[:1], 0, small())
    assert call.arguments["hidden_states"].shape[1] == 8 * 8  # of the size that was asked for, not a megapixel


def test_what_a_call_needs_is_read_from_its_signature() -> None:
    assert picture_arguments(diffusers.FluxFillPipeline) == ["image", "mask_image"]
    assert picture_arguments(diffusers.FluxPipeline) == []
    assert needs_of(diffusers.FluxPipeline) == ""
    assert "takes a picture beside each prompt (image)" in needs_of(diffusers.QwenImageEditPipeline)
    assert "starts from a picture beside each prompt (image): set capture.data" in needs_of(
        diffusers.WanImageToVideoPipeline
    )
    check_call(diffusers.WanImageToVideoPipeline, True)
    for kind in (diffusers.LucyEditPipeline, diffusers.Cosmos2_5_TransferPipeline):
        with pytest.raises(ModelError, match=r"cannot be called without (video|controls)"):
            check_call(kind, True)
    with pytest.raises(ModelError, match="VisualClozePipeline takes no prompt"):
        check_call(diffusers.VisualClozePipeline, True)
    refused = [kind.__name__ for kind in families() if "cannot be called" in needs_of(kind)]
    assert len(refused) < len(families()) / 10


def write_pictures(folder: Path, count: int = 8) -> None:
    rows = []
    for number in range(count):
        for kind, shade in (("before", 0), ("after", 255)):
            Image.new("RGB", (40, 40), (number * 20, 90, shade)).save(folder / f"{kind}-{number}.png")
        names = {"file_name": f"after-{number}.png", "source": f"before-{number}.png"}
        rows.append({**names, "text": f"make it {number}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_sources_come_from_a_column_and_evaluation_has_its_own(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    settings = CaptureConfig(data=str(tmp_path), source_column="source")
    calibration, evaluation = pictured_prompts(settings, 2, 0)
    assert (len(calibration), len(evaluation)) == (6, 2)
    assert not set(calibration) & set(evaluation)
    for prompt in (*calibration, *evaluation):
        assert isinstance(prompt, PicturedPrompt)
        assert prompt.name == f"before-{prompt.removeprefix('make it ')}.png"
        assert prompt.picture().getpixel((0, 0))[2] == 0  # type: ignore[index]
    assert pictured_prompts(settings, 2, 0)[1] == evaluation
    (captioned, *_), _ = pictured_prompts(CaptureConfig(data=str(tmp_path)), 2, 0)
    assert captioned.name.startswith("after-")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="StableDiffusion3Pipeline starts from no picture"):
        check_data(tiny("sd3_without_t5"), settings, False)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="0 usable pictures with 0 different captions, at least 4 are needed"):
        pictured_prompts(settings, 2, 0)


def test_evaluate_draws_from_pictures_where_there_are_any(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    tiny("flux_fill").save_pretrained(tmp_path / "model")
    overrides = [f"capture.data={tmp_path}", "capture.source_column=source", "evaluate.num_prompts=2"]
    prompts = evaluation_prompts([str(tmp_path / "model")], None, load_config([], overrides))
    assert [getattr(prompt, "name", None) for prompt in prompts] == [
        f"before-{prompt.removeprefix('make it ')}.png" for prompt in prompts
    ]
    assert not any(
        isinstance(p, PicturedPrompt) for p in evaluation_prompts(["emoji"], None, load_config([], overrides))
    )


def test_pictures_of_one_instruction_are_all_used_and_stay_on_one_side(tmp_path: Path) -> None:
    prompts = [PicturedPrompt(text, str(c), pictured(c).picture) for text in PROMPTS for c in (0, 99, 250)]
    settings = small(num_prompts=6, held_out_share=0.5, states_per_prompt=1)
    pipeline = tiny("flux_kontext")
    capture(pipeline, prompts, tmp_path, settings, 0)
    sides = [{mark.prompt for mark in States(tmp_path, split).marks.values()} for split in ("train", "held-out")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(PROMPTS)
    assert [len(States(tmp_path, split)) for split in ("train", "held-out")] == [3, 3]
    others = [PicturedPrompt(prompt, f"new {prompt.name}", prompt.picture) for prompt in prompts[1:5]]
    capture(pipeline, others, tmp_path, settings, 0)  # an attempt that found other pictures: nothing of the old stays
    assert sum(len(States(tmp_path, split)) for split in ("train", "held-out")) == 4
