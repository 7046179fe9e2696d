"""What a run takes, by arithmetic on shapes: hardware as text, each stage, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published import FLUX_DEV, PUBLISHED, QWEN_IMAGE, write_config

from ppcl.config import load_config
from ppcl.distill.memory import estimate_streamed
from ppcl.errors import UserError
from ppcl.inspection import blueprint
from ppcl.inspection.estimate import estimate_lines, estimate_report, estimate_run
from ppcl.inspection.hardware import hardware_here, parse_hardware
from ppcl.inspection.shapes import blueprint_of
from ppcl.pruning.planner import segments
from ppcl.student.plan import CompressionPlan, Prediction

CARD = "24GB,165TFLOPS"
COUNTED = {}
SMALL = [
    *("capture.height=256", "capture.width=256", "blocks=streamed", "fit.width=[]", "capture.batch_size=2"),
    *("analyze.batch_size=2", "fit.batch_size=2", "distill.batch_size=2", "evaluate.batch_size=2"),
    *("evaluate.velocity_states=2", "capture.num_prompts=16", "fit.eval_states=4"),
]


def estimate(folder, config, *changes, device=CARD):
    return estimate_run(str(write_config(folder, config)), load_config([], [*SMALL, *changes]), parse_hardware(device))


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """What a model's shapes cost is counted once for all tests here: devices and other settings do not change it."""

    def count(model, *sizes):
        key = ((Path(model) / "transformer" / "config.json").read_text(), *sizes)
        return COUNTED.get(key) or COUNTED.setdefault(key, blueprint_of(model, *sizes))

    monkeypatch.setattr("ppcl.inspection.estimate.blueprint_of", count)


def by_stage(found):
    return {stage.stage: stage for stage in found.stages}


# Hardware


def test_hardware_as_text():
    found = parse_hardware("8x80GB, 989TFLOPS, 256GB RAM, 4GB/s")
    assert (found.memory, found.peak, found.count) == (80e9, 989e12, 8)
    assert (found.ram, found.disk) == (256e9, 4e9)
    assert parse_hardware("24gb,300tflops").count == 1


@pytest.mark.parametrize("text", ["24GB", "300TFLOPS", "24GB,300", "0GB,300TFLOPS", "24GB,300TFLOPS,fast", ""])
def test_hardware_that_is_none(text):
    with pytest.raises(UserError, match="--device"):
        parse_hardware(text)


def test_the_machine_at_hand_says_its_memory():
    found = hardware_here("cpu")
    assert found.kind == "cpu"
    assert found.memory == found.ram > 1e8


# What is counted


def test_memory_does_not_grow_with_depth_where_blocks_are_streamed(tmp_path):
    deep, flat = (estimate(tmp_path / str(n), {**QWEN_IMAGE, "num_layers": n}) for n in (60, 12))
    for stage in ("analyze", "fit", "distill"):
        assert by_stage(deep)[stage].device == pytest.approx(by_stage(flat)[stage].device, rel=0.01)
        assert by_stage(deep)[stage].seconds > 2 * by_stage(flat)[stage].seconds
    assert deep.device < 24e9


def test_the_local_stage_is_the_estimate_of_distillation(tmp_path):
    config = load_config([], SMALL)
    model = blueprint_of(str(write_config(tmp_path, QWEN_IMAGE)), 256, 256)
    info = model.shapes.info
    run = (info.stacks[0].name, 3, 4)
    plan = CompressionPlan(
        info, "uniform", {"keep": 0.9}, {run[0]: segments(info.stacks[0], [run], {})}, Prediction(1, 1, 1, 1, None)
    )
    two = {n: v * 2 if isinstance(v, list) else v.repeat(2, *[1] * (v.ndim - 1)) for n, v in model.arguments.items()}
    (known,) = estimate_streamed(model.transformer, model.adapter, plan, two, config.distill, "bf16").values()
    found = by_stage(estimate(tmp_path, QWEN_IMAGE))["distill"]
    assert found.device - 1e9 == pytest.approx(known.total, rel=0.02)


def test_resident_blocks_take_the_whole_pipeline(tmp_path):
    found = estimate(tmp_path, QWEN_IMAGE, "blocks=auto", device="80GB,989TFLOPS")
    assert found.blocks == "resident"
    assert by_stage(found)["analyze"].device > 40.9e9 + 16e9  # the text encoder stays
    assert estimate(tmp_path, QWEN_IMAGE, "blocks=auto").blocks == "streamed"


def test_times_follow_the_device_and_the_shared_stages_their_number(tmp_path):
    slow, fast, many = (
        estimate(tmp_path, QWEN_IMAGE, device=f"{device},9999GB/s")
        for device in ("24GB,100TFLOPS", "24GB,200TFLOPS", "8x24GB,200TFLOPS")
    )
    assert slow.seconds == pytest.approx(2 * fast.seconds, rel=0.01)
    for stage in ("fit", "distill"):
        assert by_stage(many)[stage].seconds == pytest.approx(by_stage(fast)[stage].seconds / 8, rel=0.02)
    assert by_stage(many)["capture"].seconds == pytest.approx(by_stage(fast)["capture"].seconds)


def test_reading_bounds_the_time_of_streamed_capture(tmp_path):
    small = by_stage(estimate(tmp_path, QWEN_IMAGE, device="24GB,9999TFLOPS"))["capture"]
    batched = by_stage(estimate(tmp_path, QWEN_IMAGE, "capture.batch_size=16", device="24GB,9999TFLOPS"))["capture"]
    assert small.seconds > 7 * batched.seconds
    assert batched.device > small.device


def test_more_states_take_more_disk_and_what_goes_on_the_way_is_gone(tmp_path):
    found = estimate(tmp_path, QWEN_IMAGE, "capture.num_prompts=512")
    fewer = estimate(tmp_path, QWEN_IMAGE)
    assert found.disk > fewer.disk
    stages = by_stage(found)
    assert stages["fit"].left < stages["fit"].disk
    left = [stage.left for stage in found.stages]
    assert left == sorted(left)


def test_a_correction_walks_as_carried_recovery_does(tmp_path):
    with_it, without, carried = (
        by_stage(estimate(tmp_path, QWEN_IMAGE, "distill.local_steps=0", *more))["distill"]
        for more in (["distill.correct=true"], [], ["distill.carried_steps=1"])
    )
    assert with_it.seconds > without.seconds
    assert without.ram < with_it.ram <= carried.ram  # states of two walks


def test_the_output_stage_is_named_where_it_is_left_out(tmp_path):
    (note,) = by_stage(estimate(tmp_path, QWEN_IMAGE))["distill"].notes
    assert "output stage left out" in note


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_is_estimated(tmp_path, name):
    found = estimate(tmp_path, PUBLISHED[name])
    assert [stage.stage for stage in found.stages] == [
        *("capture", "analyze", "fit", "plan", "distill", "export", "evaluate")
    ]
    assert all(stage.device > 0 and stage.seconds >= 0 for stage in found.stages)
    assert len(estimate_lines(found)) <= 9


def test_what_does_not_fit_is_said(tmp_path):
    text = estimate_report(estimate(tmp_path, FLUX_DEV, "blocks=resident"))
    assert "does not fit 24 GB: capture and analyze and fit" in text
    assert "blocks=streamed" in text


# The command


def test_the_command(tmp_path, ppcl):
    model = write_config(tmp_path, {**QWEN_IMAGE, "num_layers": 6})
    given = ["inspect", model, "--estimate", "--device", CARD, *(part for text in SMALL for part in ("--set", text))]
    code, out, _ = ppcl(*given)
    assert code == 0
    assert "24 GB and 165 TFLOPS" in out
    assert "blocks streamed" in out
    assert "assumed:" in out
    code, out, _ = ppcl(*given, "--json")
    assert json.loads(out)["stages"][0]["stage"] == "capture"
    assert not (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_bad_use_of_the_command(tmp_path, ppcl, monkeypatch):
    model = write_config(tmp_path, {**QWEN_IMAGE, "num_layers": 6})
    code, _, err = ppcl("inspect", model, "--device", CARD)
    assert (code, "--estimate" in err) == (2, True)
    code, _, err = ppcl("inspect", model, "--estimate", "--device", "big")
    assert code == 2
    assert "24GB,300TFLOPS" in err
    monkeypatch.setattr(blueprint, "CALLS", {})
    code, _, err = ppcl("inspect", model, "--estimate", "--device", CARD)
    assert code == 2
    assert "not estimated" in err


def test_a_cpu_has_one_memory(tmp_path):
    found = estimate_run(
        str(write_config(tmp_path, {**QWEN_IMAGE, "num_layers": 6})), load_config([], SMALL), hardware_here("cpu")
    )
    assert all(stage.device == stage.ram for stage in found.stages)
    assert torch.get_num_threads() > 0


def test_what_is_not_counted_is_said(tmp_path):
    asked = ["plan.rounds=2", "plan.recover=3", "export.quantize=nvfp4"]
    assert not [text for text in estimate(tmp_path, FLUX_DEV).assumptions if text.startswith("not counted")]
    found = estimate(tmp_path, FLUX_DEV, *asked, "blocks=resident")
    (said,) = (text for text in found.assumptions if text.startswith("not counted"))
    assert all(text in said for text in asked)
