"""LoRA of modulation layers that are of low rank now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_lora_bridge import add_by_hand, lora_for, named
from tiny_compressed import bundle_for, compressed, teacher_for, velocity_of
from tiny_models import DUAL, SINGLE

from ppcl.errors import ModelError, UserError
from ppcl.modules.replacements import InputStatistics, LowRankLinear, fill_low_rank
from ppcl.pipelines import convert_lora, load_lora
from ppcl.student.bundle import build_student
from ppcl.teacher.families import adapter_for

MODULATION = ("img_mod.1", "txt_mod.1")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def qwen_pipe() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, compressed("qwen"))


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    return lora_for(teacher_for("qwen"), (*MODULATION, "attn.to_q"))


@torch.no_grad()
def expected_of(lora: dict[str, torch.Tensor], projected: bool, scale: float = 1.0) -> Any:
    """A student whose weights hold the whole LoRA, or its part in the span of each low-rank layer."""
    from torch import nn

    student = compressed("qwen")
    ranked = {f"{DUAL}.0.img_mod.1": f"{DUAL}.0.img_mod.1", f"{DUAL}.4.txt_mod.1": f"{DUAL}.3.txt_mod.1"}
    add_by_hand(
        student,
        {k: v for k, v in lora.items() if not any(f"transformer.{name}." in k for name in ranked)},
        named({0: 0, 3: 2, 4: 3, 5: 4}),
        lambda name: scale,
    )
    for old, path in ranked.items():
        layer = student.get_submodule(path)
        update = lora[f"transformer.{old}.lora_B.weight"] @ lora[f"transformer.{old}.lora_A.weight"]
        if projected:
            q = torch.linalg.qr(layer.up.weight)[0]
            update = q @ (q.T @ update)
        whole = nn.Linear(layer.down.in_features, layer.up.out_features)
        whole.weight.copy_(layer.up.weight @ layer.down.weight + scale * update)
        whole.bias.copy_(layer.up.bias)
        student.get_submodule(path.rpartition(".")[0])[1] = whole
    return student


@pytest.mark.parametrize("how", ["fold", "widen"])
def test_the_update_is_the_projected_or_the_whole_one(lora: dict[str, torch.Tensor], how: str) -> None:
    pipe = qwen_pipe()
    bare = velocity_of(pipe.transformer, "qwen")
    report = load_lora(pipe, lora, adapter_name="style", low_rank=how)
    expected, other = (expected_of(lora, projected) for projected in (how == "fold", how != "fold"))
    found = velocity_of(pipe.transformer, "qwen")
    torch.testing.assert_close(found, velocity_of(expected, "qwen"), **CLOSE)
    assert (found - velocity_of(other, "qwen")).norm() > 0.01 * found.norm()
    assert set(report.folded) == {f"{DUAL}.0.img_mod.1", f"{DUAL}.3.txt_mod.1"}
    shares = set(report.folded.values())
    assert shares == {1.0} if how == "widen" else all(0 < share < 0.6 for share in shares)
    assert "layers of low rank: 2, which take" in str(report)
    assert not any("mod.1" in name for name in report.lost)
    pipe.set_adapters("style", 0.5)
    half = expected_of(lora, how == "fold", 0.5)
    torch.testing.assert_close(velocity_of(pipe.transformer, "qwen"), velocity_of(half, "qwen"), **CLOSE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(velocity_of(pipe.transformer, "qwen"), bare, **CLOSE)


def test_a_widened_transformer_is_saved_with_its_new_sizes(lora: dict[str, torch.Tensor], tmp_path: Path) -> None:
    pipe = qwen_pipe()
    before = pipe.transformer.config["pruning"]
    load_lora(pipe, lora, low_rank="widen")
    pipe.fuse_lora()
    expected = velocity_of(pipe.transformer, "qwen")
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    grown = {p: v["size"] - before[p]["size"] for p, v in loaded.config["pruning"].items()}
    assert {p for p, more in grown.items() if more == 2} == {f"{DUAL}.0.img_mod.1", f"{DUAL}.3.txt_mod.1"}
    torch.testing.assert_close(velocity_of(loaded, "qwen"), expected, **CLOSE)


def test_a_second_lora_widens_further(lora: dict[str, torch.Tensor]) -> None:
    pipe = qwen_pipe()
    load_lora(pipe, lora, adapter_name="a")  # widening is the default
    load_lora(pipe, lora, adapter_name="b")
    assert pipe.transformer.config["pruning"][f"{DUAL}.0.img_mod.1"]["size"] == 3 + 2 + 2
    for names, weights, scale in ((["a", "b"], [1.0, 1.0], 2.0), (["a"], [0.5], 0.5), (["b"], [1.0], 1.0)):
        pipe.set_adapters(names, weights)
        expected = velocity_of(expected_of(lora, False, scale), "qwen")
        torch.testing.assert_close(velocity_of(pipe.transformer, "qwen"), expected, **CLOSE)
    other = qwen_pipe()
    other.transformer.get_submodule(f"{DUAL}.3.txt_mod.1").up.to("meta")  # as offloading does
    with pytest.raises(ModelError, match="offloaded"):
        load_lora(other, lora)
    assert other.transformer.config["pruning"][f"{DUAL}.0.img_mod.1"]["size"] == 3


def test_the_closed_form_keeps_its_basis() -> None:
    """U has orthonormal columns there, so that up+ B is U^T B (W_r = U U^T W, the update U U^T B A)."""
    from ppcl.pipelines.lora_low_rank import fold

    teacher = teacher_for("qwen")
    path = f"{DUAL}.0.img_mod.1"
    student = build_student(teacher, adapter_for(teacher), bundle_for(teacher, {(DUAL, 0, 0): {
        "img_mod.1": {"kind": "low_rank", "size": 3}}}))  # fmt: skip
    layer, whole = student.get_submodule(path), teacher.get_submodule(path)
    assert isinstance(layer, LowRankLinear)
    x = torch.randn(200, whole.in_features, generator=torch.Generator().manual_seed(0))
    fill_low_rank(layer, whole.weight, whole.bias, InputStatistics.of(x))
    a, b = torch.randn(2, whole.in_features), torch.randn(whole.out_features, 2)
    key = f"transformer.{path}.down.lora_B.weight"
    out, shares = fold({key: b, key.replace("lora_B", "lora_A"): a}, student)
    torch.testing.assert_close(out[key], layer.up.weight.T @ b, atol=1e-4, rtol=1e-4)
    u = layer.up.weight
    assert shares[path] == pytest.approx(((u @ u.T @ b @ a).norm() / (b @ a).norm()).item(), rel=1e-4)


def test_files_with_metadata_and_two_stacks(tmp_path: Path) -> None:
    """FLUX names both modulations ``linear``: plain names in the metadata must reach the inner layers, too."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    def pipe() -> Any:
        return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, compressed("flux"))

    lora = lora_for(teacher_for("flux"), ("norm.linear", "norm1.linear", "ff.net.2"))
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["norm.linear", "norm1.linear", "ff.net.2"],
              "alpha_pattern": {"norm.linear": 8}}  # fmt: skip
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    save_file(lora, tmp_path / "lora.safetensors", {"format": "pt", **header})
    first, second = pipe(), pipe()
    report = load_lora(first, tmp_path / "lora.safetensors", low_rank="fold")
    assert set(report.folded) == {f"{DUAL}.0.norm1.linear", f"{SINGLE}.0.norm.linear"}
    assert f"{DUAL}.0.ff" in report.lost
    convert_lora(tmp_path / "lora.safetensors", tmp_path / "new.safetensors", second)
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        written = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert f"{SINGLE}.0.norm.linear.down" in written["transformer.target_modules"]
    assert written["transformer.alpha_pattern"][f"^{SINGLE}.0.norm.linear.down"] == 8
    second.load_lora_weights(str(tmp_path / "new.safetensors"))
    found = [velocity_of(p.transformer, "flux") for p in (first, second)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)
    inner = first.transformer.get_submodule(f"{SINGLE}.0.norm.linear.down")
    assert inner.scaling == {"default_0": 4.0}
    assert (found[0] - velocity_of(compressed("flux"), "flux")).norm() > 0.01 * found[0].norm()


def test_8_bit_weights_fold_and_do_not_grow(lora: dict[str, torch.Tensor], tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    compressed("qwen").save_pretrained(tmp_path)
    kind, settings = (
        type(compressed("qwen")),
        TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2, set_inductor_config=False)),
    )

    def pipe() -> Any:
        made = qwen_pipe()
        made.transformer = kind.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
        return made

    with pytest.raises(ModelError, match=r"quantised .* low_rank='fold'"):
        load_lora(pipe(), lora)
    small = pipe()
    load_lora(small, lora, low_rank="fold")
    found, expected = velocity_of(small.transformer, "qwen"), velocity_of(expected_of(lora, True), "qwen")
    assert ((found - expected).norm() / expected.norm()).item() < 0.05


def test_what_cannot_be_folded(lora: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="expected one of fold, widen"):
        load_lora(qwen_pipe(), lora, low_rank="all")
    wrong = {k: torch.cat([v, v]) if "img_mod.1.lora_B" in k else v for k, v in lora.items()}
    for how in ("fold", "widen"):
        pipe = qwen_pipe()
        with pytest.raises(UserError, match="384 out_features, but the layer has 192"):
            load_lora(pipe, wrong, low_rank=how)
        assert pipe.transformer.config["pruning"][f"{DUAL}.0.img_mod.1"]["size"] == 3
    with_dora = {**lora, f"transformer.{DUAL}.0.img_mod.1.dora_scale": torch.ones(192)}
    from ppcl.pipelines.lora_low_rank import low_rank_paths

    assert low_rank_paths(compressed("qwen").config["pruning"], with_dora) == ()
    assert low_rank_paths(compressed("qwen").config["pruning"], lora)
