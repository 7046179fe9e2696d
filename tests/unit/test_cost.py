"""Counting parameters and FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import DUAL, SINGLE, describe_alone, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ppcl.student.prediction import predict
from ppcl.teacher.calls import velocity
from ppcl.teacher.flops import count_flops, count_params


def measured(transformer: nn.Module, call: dict[str, Any], batch: int) -> dict[str, Any]:
    stacks = {n: list(getattr(transformer, n)) for n in (DUAL, SINGLE) if hasattr(transformer, n)}
    return count_flops(transformer, stacks, lambda: velocity(transformer, call), batch)


@pytest.mark.parametrize(
    ("transformer", "call"), [(tiny_qwen(3), qwen_call(2)), (tiny_flux(), flux_call(2))], ids=["qwen", "flux"]
)
def test_total_is_torchs_and_blocks_are_parts_of_it(transformer: nn.Module, call: dict[str, Any]) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity(transformer, call)
    found = measured(transformer, call, batch=1)
    assert found["total"] == counter.get_total_flops() > 0
    blocks = [flops for counts in found["stacks"].values() for flops in counts]
    assert min(blocks) > 0
    assert sum(blocks) < found["total"]
    for counts in found["stacks"].values():
        assert len(set(counts)) == 1  # blocks of one stack are alike


def test_flops_of_a_block_are_those_of_the_block_alone() -> None:
    """A transformer of one block more costs exactly one block more."""
    small, large = measured(tiny_qwen(2), qwen_call(2), 1), measured(tiny_qwen(3), qwen_call(2), 1)
    assert large["total"] - small["total"] == large["stacks"][DUAL][0]


def test_flops_are_for_one_sample() -> None:
    transformer = tiny_qwen(2)
    assert measured(transformer, qwen_call(4), 4) == measured(transformer, qwen_call(1), 1)


def test_no_hooks_stay_behind_even_after_an_error() -> None:
    transformer = tiny_qwen(2)
    with pytest.raises(ZeroDivisionError):
        count_flops(transformer, {DUAL: list(transformer.transformer_blocks)}, lambda: 1 // 0, 1)
    for block in transformer.transformer_blocks:
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_prediction_subtracts_all_but_one_block_of_each_run() -> None:
    transformer = tiny_flux(dual=3, single=4)
    model = describe_alone(transformer, measured(transformer, flux_call(2), 2))
    assert model.params == count_params(transformer)
    found = predict(model, plan_for(transformer, [(DUAL, 0, 1), (SINGLE, 1, 3)]).stacks, error=0.25)
    block = {name: count_params(getattr(transformer, name)[0]) for name in (DUAL, SINGLE)}
    assert found.params == model.params - block[DUAL] - 2 * block[SINGLE]
    assert found.bytes == 4 * found.params
    assert found.error == 0.25
    smaller = tiny_flux(dual=2, single=2)
    assert found.params == count_params(smaller)
    assert found.speedup == pytest.approx(model.flops / measured(smaller, flux_call(2), 2)["total"])


def test_prediction_of_the_identity_plan_is_the_teacher() -> None:
    transformer = tiny_qwen(2)
    model = describe_alone(transformer)
    found = predict(model, plan_for(transformer, []).stacks)
    assert (found.params, found.param_ratio, found.speedup) == (model.params, 1.0, 1.0)
