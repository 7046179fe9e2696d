"""Students in 8 and 4 bits: their bytes are as predicted, diffusers loads them, and what cannot be made is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_lora_bridge import lora_for
from tiny_compressed import FLUX, QWEN, bundle_for, plan_with, teacher_for, velocity_of

from ppcl.config import load_config
from ppcl.config.names import Quantize
from ppcl.errors import ConfigError, ModelError, UserError
from ppcl.eval.speed import weight_bytes
from ppcl.export.quantised import check_quantize, multiplied_out, put_back, quantised
from ppcl.modules.replacements import LowRankLinear
from ppcl.pipelines import load_lora
from ppcl.student.bundle import build_student
from ppcl.student.stored_size import StoredSize, layer_bytes, layers_of
from ppcl.teacher.call_arguments import to_dtype
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params

CPU = torch.device("cpu")
PARTS = {"qwen": QWEN, "flux": FLUX}


@pytest.fixture(params=["int8", "fp8", "nvfp4"])
def kind(request: pytest.FixtureRequest) -> Quantize:
    """The formats that any device makes."""
    pytest.importorskip("torchao", minversion="0.17")
    made: Quantize = request.param
    return made


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bitsandbytes on the CPU, which its own kernels know and diffusers refuses."""
    bnb = pytest.importorskip("bitsandbytes", minversion="0.46")
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

    monkeypatch.setattr(Quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda _, given: {"": "cpu"} if given is None else given)
    yield bnb


def student_of(family: str) -> Any:
    teacher = teacher_for(family)
    return build_student(teacher, adapter_for(teacher), bundle_for(teacher, PARTS[family]))


def bytes_of_tensors(folder: Path) -> int:
    """What tensors take in a folder's files, without the files' headers."""
    size = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            size += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    return size


@torch.no_grad()
def in_bfloat16(model: Any, family: str) -> torch.Tensor:
    from tiny_compressed import CALLS

    found: torch.Tensor = model(**to_dtype(CALLS[family](seed=0), torch.bfloat16), return_dict=False)[0]
    return found.float()


def check_files(family: str, kind: Quantize, folder: Path) -> Any:
    """Quantise, save and load; bytes are what the plan predicted, and no file is a pickle."""
    teacher = teacher_for(family)
    plan = plan_with(teacher, PARTS[family])
    made = quantised(student_of(family), kind, folder / "scratch", CPU)
    made.save_pretrained(folder / "out", max_shard_size="1GB" if kind == "nf4" else "40KB")  # see export
    assert {path.suffix for path in (folder / "out").iterdir()} == {".json", ".safetensors"}
    assert not list((folder / "scratch").iterdir())
    predicted = StoredSize(teacher, adapter_for(teacher), kind).of(plan.stacks)
    assert bytes_of_tensors(folder / "out") == pytest.approx(predicted, rel=0.002 if kind == "nf4" else 0)
    settings = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] in ("torchao", "bitsandbytes")
    again, info = type(made).from_pretrained(folder / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return made, again


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_files_are_as_large_as_predicted_and_load(family: str, kind: Quantize, tmp_path: Path) -> None:
    made, again = check_files(family, kind, tmp_path)
    torch.testing.assert_close(in_bfloat16(again, family), in_bfloat16(made, family), atol=0, rtol=0)
    expected = velocity_of(student_of(family), family)
    error = ((in_bfloat16(again, family) - expected).norm() / expected.norm()).item()
    assert 0 < error < (0.1 if kind == "nvfp4" else 0.03)
    low_rank = [m for m in again.modules() if isinstance(m, LowRankLinear)]
    assert low_rank
    assert all(type(part.weight.data) is torch.Tensor for layer in low_rank for part in (layer.down, layer.up))
    assert weight_bytes(again) == pytest.approx(bytes_of_tensors(tmp_path / "out"), rel=0.001)
    assert count_params(again) == count_params(student_of(family))
    plain = set(layers_of(again, adapter_for(again), kind))
    assert all(type(again.get_submodule(path).weight.data) is not torch.Tensor for path in plain)


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_nf4_of_bitsandbytes(family: str, bitsandbytes: Any, tmp_path: Path) -> None:
    made, again = check_files(family, "nf4", tmp_path)
    student = student_of(family)
    for name, weight in multiplied_out(again, "nf4").items():
        before = student.get_parameter(name)
        assert 0 < (weight - before).norm() / before.norm() < 0.15
    assert count_params(again) == count_params(student)
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in made.modules())


def test_weights_multiplied_out_say_the_same(kind: Quantize, tmp_path: Path) -> None:
    made = quantised(student_of("qwen"), kind, tmp_path, CPU)
    plain = student_of("qwen").to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in multiplied_out(made, kind).items():
            plain.get_parameter(name).copy_(weight)
    first, second = in_bfloat16(plain, "qwen"), in_bfloat16(made, "qwen")
    assert (first - second).norm() / first.norm() < 0.01


def test_recovered_tensors_are_put_back(kind: Quantize, tmp_path: Path) -> None:
    made = quantised(student_of("qwen"), kind, tmp_path, CPU)
    bias = torch.full_like(made.img_in.bias, 0.25, dtype=torch.float32)
    put_back(made, {"img_in.bias": bias})
    assert made.img_in.bias.dtype == torch.bfloat16
    torch.testing.assert_close(made.img_in.bias.float(), bias)


def test_what_is_quantised_is_not_quantised_again(kind: Quantize, tmp_path: Path) -> None:
    made = quantised(student_of("qwen"), kind, tmp_path, CPU)
    with pytest.raises(UserError, match=r"is quantised already"):
        quantised(made, kind, tmp_path, CPU)


def test_layers_of_sizes_that_a_format_does_not_take_stay() -> None:
    assert layer_bytes("nvfp4", 24, 32) is None
    assert layer_bytes("int4", 8, 48) is None
    assert layer_bytes("int4", 8, 96) == 8 * 96 // 2 + 4 * (8 * 96 // 32)
    assert layer_bytes("int4", 8, 256) == 8 * 256 // 2 + 4 * (8 * 256 // 128)


def test_no_name_of_a_layer_outside_is_taken_for_one_inside(tmp_path: Path) -> None:
    """FLUX has a ``proj_out`` in each single block and one of its own."""
    pytest.importorskip("torchao", minversion="0.17")
    made = quantised(student_of("flux"), "int8", tmp_path, CPU)
    assert type(made.proj_out.weight.data) is torch.Tensor
    assert all(type(b.proj_out.weight.data) is not torch.Tensor for b in made.single_transformer_blocks)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_formats_of_cuda_are_refused_on_a_cpu(kind: Quantize) -> None:
    with pytest.raises(UserError, match=rf"export.quantize={kind} needs a CUDA device.*nvfp4") as error:
        check_quantize(kind, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "module", "says"),
    [
        ("int8", "torchao.prototype.safetensors.safetensors_utils", r"needs the package torchao.*ppcl\[int8\]"),
        ("nf4", "bitsandbytes", r"needs the package bitsandbytes.*ppcl\[nf4\].*nvfp4"),
    ],
)
def test_a_missing_package_is_named(kind: Quantize, module: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=says):
        check_quantize(kind, torch.device("cuda"))


def test_a_torchao_without_safetensors_of_a_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", minversion="0.17")
    old: Any = ModuleType("old")
    old.ALLOWED_TENSORS_SUBCLASSES = ["Float8Tensor"]
    monkeypatch.setitem(sys.modules, "torchao.prototype.safetensors.safetensors_utils", old)
    check_quantize("fp8", CPU)
    with pytest.raises(UserError, match="cannot write it as safetensors; pip install --upgrade torchao"):
        check_quantize("nvfp4", CPU)


def test_int4_names_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", minversion="0.17")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs the package mslk.*mslk-cuda"):
        check_quantize("int4", torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["export.dtype=float32"], "stores the rest in bfloat16"),
        (["sparsity.pattern=2:4"], "does not keep the zeros"),
        (["blocks=streamed"], "in memory whole"),
        (["export.quantize=int8"], "quantize=nvfp4 and export.quantize=int8 are one setting"),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("quantize: nvfp4\nexport: {quantize: int8}\n" if "one setting" in says else "{}")
    with pytest.raises(ConfigError, match=says):
        load_config([file], ["quantize=nvfp4", *settings])


def test_the_short_name_is_the_setting_and_off_it_changes_nothing() -> None:
    assert load_config([], ["quantize=nvfp4"]).export.quantize == "nvfp4"
    with pytest.raises(ConfigError, match=r"export.quantize = 'q4'"):
        load_config([], ["quantize=q4"])
    off, on = load_config([], ["export.recover_steps=7"]), load_config([], ["quantize=int8"])
    assert off.export.identity() == load_config([], []).export.identity() != on.export.identity()
    assert on.planned_format == "none"
    assert load_config([], ["quantize=int8", "plan.fit_gb=8"]).planned_format == "int8"


def test_headers_name_what_torchao_needs(kind: Quantize, tmp_path: Path) -> None:
    quantised(student_of("qwen"), kind, tmp_path / "scratch", CPU).save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert "tensor_names" in file.metadata()


def pipe_of(transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)


@pytest.mark.parametrize("how", ["fold", "widen"])
def test_a_lora_of_the_teacher_does_what_it_does_on_plain_weights(kind: Quantize, how: str, tmp_path: Path) -> None:
    """Layers of low rank are not quantised, so that they grow as others do."""
    lora = {n: 4 * t for n, t in lora_for(teacher_for("qwen"), ("img_mod.1", "attn.to_q", "attn.to_out.0")).items()}
    effects = []
    for student in (student_of("qwen").to(torch.bfloat16), quantised(student_of("qwen"), kind, tmp_path, CPU)):
        bare = in_bfloat16(student, "qwen")
        load_lora(pipe_of(student), lora, low_rank=how)
        effects.append(in_bfloat16(student, "qwen") - bare)
    assert effects[0].norm() > 0.05 * bare.norm()
    assert (effects[1] - effects[0]).norm() < 0.2 * effects[0].norm()


def test_int4_takes_no_lora() -> None:
    """PEFT refuses torchao's Int4Tensor, deep inside and with an error of its own."""
    tensors = pytest.importorskip("torchao.quantization", minversion=None)
    student = student_of("qwen")
    layer, like = student.transformer_blocks[0].attn.to_q, {"dtype": torch.bfloat16}
    scales = [torch.ones(1, 32, **like) for _ in range(2)]
    weight = tensors.Int4Tensor(torch.zeros(32, 16, dtype=torch.int8), *scales, [1, 32], layer.weight.shape)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    lora = lora_for(teacher_for("qwen"), ("attn.to_q",))
    with pytest.raises(ModelError, match=r"no LoRA on layers of torchao's int4.*nvfp4"):
        load_lora(pipe_of(student), lora)
