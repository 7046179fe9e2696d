"""The memory model against what is measured, and refusing what will not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_heads import heads_of
from tiny_models import (
    DUAL,
    SINGLE,
    flux_call,
    plan_for,
    qwen_call,
    random_substitutes,
    tiny_flux,
    tiny_qwen,
    write_states,
)
from torch import nn

from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.config import DistillConfig
from ppcl.config.memory import changed
from ppcl.distill.carried import StudentWalk
from ppcl.distill.correction import correct
from ppcl.distill.fake import LiveBytes, lasting_tensors
from ppcl.distill.in_sweep import Ends, training_course
from ppcl.distill.local import local_backward
from ppcl.distill.memory import check_memory, estimate_distill, optimizer_bytes, output_student, weight_bytes
from ppcl.distill.trainer import Distiller
from ppcl.errors import TrainingError
from ppcl.inspection.blueprint import build_on_meta
from ppcl.modules.slicing import neurons_of
from ppcl.student.assembly import RunKey, substitute_block
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.training.distributed import SINGLE as ALONE
from ppcl.training.losses import velocity_loss

CASES: dict[str, Any] = {
    "qwen": (lambda: tiny_qwen(6), lambda: qwen_call(batch=8, padded=True), [(DUAL, 1, 2), (DUAL, 3, 4)]),
    "flux": (tiny_flux, lambda: flux_call(batch=8), [(DUAL, 0, 1), (SINGLE, 1, 2)]),
}


def measured(transformer: nn.Module, call: dict[str, Any], runs: list[Any], released: bool) -> int:
    """Peak of one local step beyond the weights, counted operator by operator."""
    adapter = adapter_for(transformer)
    blocks = random_substitutes(transformer, adapter, runs)

    def drop(run: Any) -> None:
        if released:
            blocks[run].zero_grad(set_to_none=True)

    with LiveBytes(lasting_tensors(transformer, *blocks.values())) as meter:
        local_backward(transformer, adapter, call, blocks, done=drop)
    return meter.peak


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("released", [False, True])
def test_the_local_step_is_predicted(case: Any, released: bool) -> None:
    new, call, runs = case
    transformer, arguments = new(), call()
    settings = DistillConfig(output_steps=0, release_gradients=released)
    plan = plan_for(transformer, runs)
    (estimate,) = estimate_distill(transformer, adapter_for(transformer), plan, arguments, settings).values()
    numbers = sum(p.numel() for run in runs for p in getattr(transformer, run[0])[run[1]].parameters())
    assert estimate.teacher == weight_bytes(transformer)
    assert (estimate.trained, estimate.optimizer, estimate.average) == (4 * numbers, 8 * numbers, 4 * numbers)
    assert estimate.gradients + estimate.step == pytest.approx(
        measured(transformer, arguments, runs, released), rel=0.03
    )


def with_width(transformer: nn.Module, runs: list[RunKey]) -> CompressionPlan:
    """A plan of these runs in which every block has smaller modules of each kind that its class has."""
    plan, stacks = plan_for(transformer, runs), {}
    for spec in adapter_for(transformer).stacks:
        parts: dict[str, Any] = {path: {"kind": "low_rank", "size": 4} for path in spec.modulation.values()}
        block = getattr(transformer, spec.name)[0]
        networks = list(spec.ffn.values())
        parts |= {path: {"kind": "linear", "size": 0} for path in networks[1:]}
        for units in filter(None, [heads_of(block.attn), *(neurons_of(block.get_submodule(n)) for n in networks[:1])]):
            path = "attn" if units.kind == "heads" else networks[0]
            parts[path] = units.part(range(units.count // 2))
        stacks[spec.name] = tuple(replace(segment, width=parts) for segment in plan.stacks[spec.name])
    return replace(plan, stacks=stacks)


def real_substitutes(transformer: nn.Module, plan: CompressionPlan) -> dict[RunKey, nn.Module]:
    return {
        (name, segment.first, segment.last): substitute_block(getattr(transformer, name), segment).float()
        for name, segments in plan.stacks.items()
        for segment in segments
        if segment.is_substitute
    }


def allocated(call: Callable[[], object]) -> int:
    """Peak of what a call takes from the allocator beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("released", [False, True])
def test_the_local_step_of_smaller_modules_is_predicted(case: Any, released: bool) -> None:
    new, call, runs = case
    transformer, arguments = new(), call()
    plan, adapter = with_width(transformer, runs), adapter_for(transformer)
    settings = DistillConfig(output_steps=0, release_gradients=released)
    (estimate,) = estimate_distill(transformer, adapter, plan, arguments, settings).values()
    blocks = real_substitutes(transformer, plan)
    numbers = sum(p.numel() for block in blocks.values() for p in block.parameters() if p.requires_grad)
    assert estimate.trained == sum(map(weight_bytes, blocks.values()))
    assert (estimate.optimizer, estimate.average) == (8 * numbers, 4 * numbers)

    def drop(run: RunKey) -> None:
        if released:
            blocks[run].zero_grad(set_to_none=True)

    peak = allocated(lambda: local_backward(transformer, adapter, arguments, blocks, done=drop))
    assert estimate.gradients + estimate.step == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("train", ["all", "substitutes", "lora"])
@pytest.mark.parametrize("width", [False, True], ids=["depth", "width"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_output_step_is_predicted(case: Any, width: bool, train: Any) -> None:
    new, call, runs = case
    transformer, arguments = new(), call()
    adapter = adapter_for(transformer)
    plan = with_width(transformer, runs) if width else plan_for(transformer, runs)
    settings = DistillConfig(local_steps=0, train=train)
    (estimate,) = estimate_distill(transformer, adapter, plan, arguments, settings).values()
    student = output_student(transformer, adapter, plan, real_substitutes(transformer, plan), settings)
    trained = [p for p in student.parameters() if p.requires_grad]
    teacher = set(map(id, lasting_tensors(transformer)))
    own = {id(t): t.nbytes for t in lasting_tensors(student) if id(t) not in teacher}
    assert estimate.trained == sum(own.values())
    assert estimate.optimizer == 8 * sum(p.numel() for p in trained)

    def step() -> None:
        output = velocity(student, arguments)
        velocity_loss(output, torch.zeros_like(output)).backward()

    assert estimate.step == pytest.approx(allocated(step), rel=0.05)


@pytest.mark.parametrize("stage", ["local", "output"])
def test_the_peak_of_a_whole_training_is_predicted(stage: str, tmp_path: Path) -> None:
    """Weights, optimizer and average in it, and nothing beside them: the start is not kept in memory."""
    transformer, call = tiny_qwen(8), qwen_call(batch=2)
    adapter, plan = adapter_for(transformer), plan_for(transformer, [(DUAL, i, i + 1) for i in (1, 3, 5)])
    for split in ("train", "held-out"):
        write_states(tmp_path / "calibration", split, [call], transformer)
    steps = {f"{name}_steps": 3 if name == stage else 0 for name in ("local", "output")}
    settings = DistillConfig(batch_size=2, from_fit=False, release_gradients=False, **steps)
    (estimate,) = estimate_distill(transformer, adapter, plan, call, settings).values()

    def train() -> None:
        Distiller(transformer, adapter, plan, tmp_path / "calibration", tmp_path, settings, seed=0).run()

    assert estimate.total - estimate.teacher == pytest.approx(allocated(train), rel=0.05)
    assert not (tmp_path / "checkpoints" / "distill-start.safetensors").exists()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_estimates_leave_the_memory_of_the_process_alone(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake parameters must never be swapped, copied or cut: torch damages the heap then."""
    new, call, runs = case
    transformer, arguments = new(), call()
    plan, adapter = with_width(transformer, runs), adapter_for(transformer)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}

    def refuse(*_: Any) -> None:
        raise AssertionError("the tensors of two parameters were swapped")

    monkeypatch.setattr(torch.utils, "swap_tensors", refuse)
    settings = DistillConfig(alternating_steps=1, checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where the numbers of a fake tensor are asked for
        found = [estimate_distill(transformer, adapter, plan, arguments, settings) for _ in range(2)]
    assert set(found[0]) == {"local", "alternating", "output"}
    assert all(estimate == found[0] for estimate in found)
    for name, tensor in transformer.state_dict().items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("runs", [[], [(DUAL, 1, 2)]])
def test_with_zeros_every_block_is_trained_and_has_masks(runs: list[Any]) -> None:
    transformer = tiny_qwen(4)
    numbers = sum(p.numel() for p in transformer.transformer_blocks[0].parameters()) * (3 if runs else 4)
    settings = DistillConfig.model_validate({"train": "substitutes", "sparsity": {"share": 0.5}})
    plan = plan_for(transformer, runs)
    found = estimate_distill(transformer, adapter_for(transformer), plan, qwen_call(), settings)
    assert set(found) == {"local", "output"}
    for estimate in found.values():
        assert estimate.trained == (4 + 1) * numbers
        assert (estimate.optimizer, estimate.average) == (8 * numbers, 4 * numbers)


def test_one_at_a_time_holds_one_substitute_and_streaming_one_block() -> None:
    transformer = tiny_qwen(6)
    plan = plan_for(transformer, [(DUAL, 1, 2), (DUAL, 3, 4)])
    adapter, block = adapter_for(transformer), weight_bytes(transformer.transformer_blocks[0])

    def estimate(**changes: Any) -> Any:
        settings = DistillConfig(output_steps=0, **changes)
        return estimate_distill(transformer, adapter, plan, qwen_call(), settings)["local"]

    joint, single = estimate(release_gradients=False), estimate(one_at_a_time=True)
    small = estimate(optimizer="adamw8bit")
    assert (joint.trained, joint.gradients) == (2 * block, block)
    assert (single.trained, single.gradients, single.optimizer) == (block, 0, 2 * block)
    assert joint.teacher - estimate(offload="cpu").teacher == 5 * block
    assert small.optimizer < 0.27 * joint.optimizer
    assert optimizer_bytes(256, "adamw8bit") == 2 * 256 + 2 * 4


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_correction_is_predicted(case: Any, tmp_path: Path) -> None:
    new, call, runs = case
    transformer, arguments = new(), call()
    adapter, plan = adapter_for(transformer), plan_for(transformer, runs)
    settings = DistillConfig(local_steps=0, output_steps=0, correct=True)
    (estimate,) = estimate_distill(transformer, adapter, plan, arguments, settings).values()
    assert (estimate.optimizer, estimate.average, estimate.gradients) == (0, 0, 0)
    write_states(tmp_path, "train", [arguments], transformer)
    states, peaks = States(tmp_path, "train"), []
    course = training_course(ResidentBlocks(transformer), {"train": states}, 8, tmp_path / "store", "x")
    blocks = random_substitutes(transformer, adapter, runs)

    def measure(run: RunKey, ends: Ends) -> nn.Module:
        peaks.append(allocated(lambda: correct(blocks[run], ends, lambda: 0.0, ALONE)))
        return blocks[run]

    walk = StudentWalk(course, runs, measure)
    forward_sweep(course, [walk], walk.last)
    course.store.close()
    assert 0.5 * estimate.step < max(peaks) < 1.1 * estimate.step
    trained = estimate_distill(transformer, adapter, plan, arguments, changed(settings, carried_steps=1))["carried"]
    assert trained.total >= estimate.total


@pytest.mark.slow
def test_checkpointing_and_depth_show_in_the_output_stage() -> None:
    transformer = tiny_qwen(8)
    adapter = adapter_for(transformer)
    plan, call = plan_for(transformer, [(DUAL, 1, 2)]), qwen_call(batch=24)

    def estimate(**changes: Any) -> Any:
        return estimate_distill(transformer, adapter, plan, call, DistillConfig(local_steps=0, **changes))

    plain, frugal = estimate()["output"], estimate(checkpointing=True)["output"]
    assert frugal.step < 0.7 * plain.step
    assert estimate(alternating_steps=1)["alternating"].step > plain.step  # a hybrid is as deep as the teacher at worst
    assert plain.trained > 8 * weight_bytes(transformer.transformer_blocks[0]) * 0.85
    assert estimate(train="substitutes")["output"].optimizer < 0.2 * plain.optimizer


def test_a_model_without_weights_will_do() -> None:
    real = tiny_qwen(4)
    meta = build_on_meta({"_class_name": type(real).__name__, **real.config})
    plan, settings = plan_for(real, [(DUAL, 1, 2)]), DistillConfig()
    found = [estimate_distill(m, adapter_for(m), plan, qwen_call(), settings) for m in (real, meta)]
    assert found[0] == found[1]
    assert all(estimate.step > 0 for estimate in found[0].values())


def test_what_will_not_fit_is_refused_with_a_remedy() -> None:
    transformer = tiny_qwen(4)
    plan = plan_for(transformer, [(DUAL, 1, 2)])
    found = estimate_distill(transformer, adapter_for(transformer), plan, qwen_call(), DistillConfig(output_steps=0))
    total, present = found["local"].total, weight_bytes(transformer)
    check_memory(found, present, total - present)
    with pytest.raises(TrainingError, match=r"local stage needs .* are there .*distill\.one_at_a_time=true"):
        check_memory(found, present, total - present - 1)
    check_memory({"output": replace(found["local"], teacher=0)}, 0, total - present)


def test_bfloat16_takes_less_for_large_batches() -> None:
    transformer = tiny_qwen(4).to(torch.bfloat16)
    arguments = {k: v.bfloat16() if k.endswith("states") else v for k, v in qwen_call(batch=64).items()}
    common = (transformer, adapter_for(transformer), plan_for(transformer, [(DUAL, 1, 2)]), arguments)
    low, full = (estimate_distill(*common, DistillConfig(output_steps=0), p)["local"] for p in ("bf16", "fp32"))
    assert low.step < full.step


def test_processes_share_a_teacher_that_is_split() -> None:
    transformer = tiny_qwen(3)
    adapter, plan = adapter_for(transformer), plan_for(transformer, [(DUAL, 0, 1)])
    blocks = [weight_bytes(block) for spec in adapter.stacks for block in adapter.blocks(transformer, spec)]

    def teacher(processes: int, **changes: bool) -> set[int]:
        settings = DistillConfig(alternating_steps=1, **changes)
        found = estimate_distill(transformer, adapter, plan, qwen_call(), settings, processes=processes)
        return {estimate.teacher for estimate in found.values()}

    whole = weight_bytes(transformer)
    assert teacher(2) == teacher(1, shard_teacher=True) == {whole}
    assert teacher(8, shard_teacher=True) == {whole - sum(blocks) + sum(blocks) // 8 + 2 * max(blocks)}


def test_gradients_of_parts_stay_until_the_last_one() -> None:
    transformer = tiny_qwen(6)
    plan = plan_for(transformer, [(DUAL, 1, 2), (DUAL, 3, 4)])
    block = 4 * sum(p.numel() for p in transformer.transformer_blocks[1].parameters())

    def gradients(**changes: Any) -> int:
        settings = DistillConfig(output_steps=0, **changes)
        return estimate_distill(transformer, adapter_for(transformer), plan, qwen_call(), settings)["local"].gradients

    assert [gradients(), gradients(accumulate=2)] == [0, 2 * block]
