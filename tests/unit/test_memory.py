"""The memory model against what is measured, and refusing what will not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import DUAL, SINGLE, flux_call, plan_for, qwen_call, random_substitutes, tiny_flux, tiny_qwen
from torch import nn

from ppcl.config import DistillConfig
from ppcl.distill.fake import LiveBytes
from ppcl.distill.local import local_backward
from ppcl.distill.memory import (
    check_memory,
    estimate_distill,
    local_step_bytes,
    optimizer_bytes,
    weight_bytes,
)
from ppcl.errors import TrainingError
from ppcl.inspection.blueprint import build_on_meta
from ppcl.teacher.families import adapter_for

CASES: dict[str, Any] = {
    "qwen": (lambda: tiny_qwen(6), lambda: qwen_call(batch=8, padded=True), [(DUAL, 1, 2), (DUAL, 3, 4)]),
    "flux": (tiny_flux, lambda: flux_call(batch=8), [(DUAL, 0, 1), (SINGLE, 1, 2)]),
}


def measured(transformer: nn.Module, call: dict[str, Any], runs: list[Any], released: bool) -> int:
    """Peak of one local step beyond the weights, counted operator by operator."""
    adapter = adapter_for(transformer)
    blocks = random_substitutes(transformer, adapter, runs)
    lasting = [p for module in (transformer, *blocks.values()) for p in module.parameters()]

    def drop(run: Any) -> None:
        if released:
            blocks[run].zero_grad(set_to_none=True)

    with LiveBytes(lasting) as meter:
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
    runs = [(DUAL, 1, 2)]
    peaks = [local_step_bytes(m, adapter_for(m), qwen_call(), runs, "fp32") for m in (real, meta)]
    assert peaks[0] == peaks[1]
    assert peaks[0][DUAL] > 0


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
    adapter = adapter_for(transformer)
    low, full = (local_step_bytes(transformer, adapter, arguments, [(DUAL, 1, 2)], p) for p in ("bf16", "fp32"))
    assert low[DUAL] < full[DUAL]


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
