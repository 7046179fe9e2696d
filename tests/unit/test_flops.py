"""Counting parameters and FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from published import QWEN_IMAGE
from tiny_models import DUAL, SINGLE, describe_alone, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from ppcl.inspection.blueprint import build_on_meta, example_call, flops_on_meta
from ppcl.student.prediction import predict
from ppcl.teacher.calls import velocity
from ppcl.teacher.flops import count_flops, count_params

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
KERNELS = [kernel for name, kernel in SDPBackend.__members__.items() if name not in ("ERROR", "OVERRIDEABLE")]


def measured(transformer: nn.Module, call: dict[str, Any], batch: int) -> dict[str, Any]:
    stacks = {n: list(getattr(transformer, n)) for n in (DUAL, SINGLE) if hasattr(transformer, n)}
    return count_flops(transformer, stacks, lambda: velocity(transformer, call), batch)


@pytest.mark.parametrize(
    ("transformer", "call"), [(tiny_qwen(3), qwen_call(2)), (tiny_flux(), flux_call(2))], ids=["qwen", "flux"]
)
def test_total_is_torchs_and_blocks_are_parts_of_it(transformer: nn.Module, call: dict[str, Any]) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity(transformer, call)
    found = measured(transformer, call, batch=1)
    assert found["total"] == counter.get_total_flops() > 0
    blocks = [flops for counts in found["stacks"].values() for flops in counts]
    assert min(blocks) > 0
    assert sum(blocks) < found["total"]
    for counts in found["stacks"].values():
        assert len(set(counts)) == 1  # blocks of one stack are alike


def qwen_by_hand(config: Any, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of a Qwen-Image transformer: two for each multiplication of a weight or a query by a token."""
    width, tokens = config["attention_head_dim"] * config["num_attention_heads"], image_tokens + text_tokens
    embedders = image_tokens * config["in_channels"] * width + text_tokens * config["joint_attention_dim"] * width
    embedders += 256 * width + width * width  # of the timestep
    weights = 4 * width * width + 2 * 4 * width * width  # queries, keys, values, output; feed-forward of four widths
    modulation = 2 * 6 * width * width  # of the picture and of the text, once for all tokens
    block = tokens * weights + modulation + 2 * tokens * tokens * width  # Q K^T, and its softmax times V
    head = 2 * width * width + image_tokens * width * config["patch_size"] ** 2 * config["out_channels"]
    return 2 * (embedders + config["num_layers"] * block + head)


def test_qwen_image_at_1024_pixels_is_as_by_hand() -> None:
    transformer = build_on_meta(QWEN_IMAGE)
    call = example_call(transformer, (64, 64), 128)  # 16 pixels a token
    assert flops_on_meta(transformer, call)["total"] == qwen_by_hand(QWEN_IMAGE, 64 * 64, 128) == 70_576_604_971_008


def offered(kernel: SDPBackend, device: str, heads: int = 2) -> bool:
    """Whether torch has a kernel here."""
    query, key = torch.ones(1, 2, 6, 16, device=device), torch.ones(1, heads, 6, 16, device=device)
    try:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(query, key, key, enable_gqa=heads != 2)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_real_model_costs_the_same_under_every_kernel(kernel: SDPBackend, device: str, masked: bool) -> None:
    if not offered(kernel, device):
        pytest.skip("not on this machine")
    real = tiny_qwen(3).to(device)
    call = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in qwen_call(2, padded=masked).items()}
    with sdpa_kernel([kernel, SDPBackend.MATH] if masked else kernel):  # not every kernel takes masks
        flops = measured(real, call, 2)
    blueprint = build_on_meta({**real.config, "_class_name": type(real).__name__})
    assert flops == flops_on_meta(blueprint, example_call(blueprint, (2, 3), 5))
    assert flops["total"] == qwen_by_hand(real.config, 6, 5)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex", "flash", "sage", "xformers"])
def test_a_real_model_costs_the_same_under_every_backend_of_diffusers(backend: str) -> None:
    """Also under those of packages whose kernels cannot be counted, and which are not installed here."""
    real, expected = tiny_qwen(3), measured(tiny_qwen(3), qwen_call(1), 1)
    name = AttentionBackendName(backend)
    for block in real.transformer_blocks:
        block.attn.processor._attention_backend = name
    assert measured(real, qwen_call(1), 1) == expected
    assert {block.attn.processor._attention_backend for block in real.transformer_blocks} == {name}
    if backend.startswith("_native"):
        with attention_backend(backend):
            assert measured(tiny_qwen(3), qwen_call(1), 1) == expected


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_grouped_queries(kernel: SDPBackend, device: str) -> None:
    """Each of four heads of queries meets all keys, of which there are two heads."""
    if device != "meta" and not offered(kernel, device, heads=1):
        pytest.skip("not on this machine")
    query, key, value = (torch.ones(3, heads, tokens, 16, device=device) for heads, tokens in ((4, 5), (2, 7), (2, 7)))

    def attend() -> None:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(query, key, value, enable_gqa=True)

    assert count_flops(nn.Identity(), {}, attend, 3)["total"] == 2 * 4 * 5 * 7 * (16 + 16)


def test_products_of_int8_count() -> None:
    first, second = torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 16, dtype=torch.int8)
    assert count_flops(nn.Identity(), {}, lambda: torch._int_mm(first, second), 1)["total"] == 2 * 32 * 64 * 16


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
