"""LoKr, DoRA, LoHa, and the names that FLUX.2's LoRA come with, on compressed transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_heads import heads_of
from safetensors.torch import save_file
from tiny_compressed import bundle_for
from tiny_models import DUAL, SINGLE, flux_call, noise, tiny_flux, tiny_qwen
from torch import Tensor

from ppcl.errors import UserError
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import neurons_of
from ppcl.pipelines import load_lora
from ppcl.pipelines.lora_cut import fit_replaced
from ppcl.student.bundle import build_student
from ppcl.teacher.families import adapter_for

FUSED = {".to_qkv.": ("to_q", "to_k", "to_v"), ".to_added_qkv.": ("add_q_proj", "add_k_proj", "add_v_proj")}


def student_of(teacher: Any, parts: Any) -> Any:
    return build_student(copy.deepcopy(teacher), adapter_for(teacher), bundle_for(teacher, parts))


def narrowed(transformer: Any, path: str, units: Any) -> None:
    """Leave every second unit of a module."""
    parts = {**(transformer.config.get("pruning") or {}), path: units.part(range(0, units.count, 2))}
    apply_width(transformer, {path: parts[path]})
    compress_class(transformer, parts)


def z_image() -> Any:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return transformer.eval().requires_grad_(False)


def flux2() -> Any:
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=4, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    return transformer.eval().requires_grad_(False)


def pipe_of(transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxPipeline, ZImagePipeline

    scheduler, name = FlowMatchEulerDiscreteScheduler(), type(transformer).__name__
    if "ZImage" in name:
        return ZImagePipeline(scheduler, None, None, None, transformer)
    if "Flux2" in name:
        return Flux2KleinPipeline(scheduler, None, None, None, transformer)
    return FluxPipeline(scheduler, None, None, None, None, None, transformer)


def gains(transformer: Any, load: Callable[[], Any]) -> dict[str, Tensor]:
    """What an adapter adds to each weight, projections that are fused meanwhile split again."""
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    load()
    for module in transformer.modules():
        if hasattr(module, "merge") and getattr(module, "active_adapters", None):
            module.merge()
    found = {}
    for name, weight in transformer.named_parameters():
        plain = name.replace(".base_layer", "")
        for fused, parts in FUSED.items():
            if plain.endswith(f"{fused}weight") and plain not in before:
                for part, piece in zip(parts, weight.chunk(3), strict=True):
                    own = plain.replace(fused, f".{part}.")
                    found[own] = piece - before[own]
        if plain in before:
            found[plain] = weight - before[plain]
    return {name: delta for name, delta in found.items() if float(delta.abs().max()) > 1e-6}


def expect_the_teachers(teacher: Any, student: Any, tensors: dict[str, Tensor], left_out: str = "none") -> Any:
    """Every kept block's weights gain what the teacher's gain, but for one module."""
    wanted = gains(teacher, lambda: pipe_of(teacher).load_lora_weights(dict(tensors)))
    reports: list[Any] = []
    found = gains(student, lambda: reports.append(load_lora(pipe_of(student), dict(tensors))))
    kept = student.config["_ppcl"]["kept_blocks"]
    expected = {}
    for name, delta in wanted.items():
        stack, index, rest = name.split(".", 2)
        if stack in kept and int(index) in kept[stack]:
            expected[f"{stack}.{kept[stack].index(int(index))}.{rest}"] = delta
    expected = {name: delta for name, delta in expected.items() if not name.startswith(left_out)}
    assert expected and found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, atol=1e-5, rtol=1e-4)
    return reports[0]


def z_image_lokr(teacher: Any) -> dict[str, Tensor]:
    rows = teacher.layers[0].feed_forward.w1.out_features
    tensors: dict[str, Tensor] = {}
    for i in range(6):
        for part, left, out in (("attention.to_q", 4, 32), ("feed_forward.w1", 1, rows)):
            base = f"diffusion_model.layers.{i}.{part}"
            tensors |= {
                f"{base}.lokr_w1": noise(left, 4, seed=i), f"{base}.lokr_w2": noise(out // left, 8, seed=i + 50),
                f"{base}.alpha": torch.tensor(1e10),
            }  # fmt: skip
    return tensors


@pytest.mark.parametrize("cut", ["nothing", "network", "heads"])
def test_a_lokr_is_left_out_where_units_are_gone(cut: str) -> None:
    teacher = z_image()
    student, path = student_of(teacher, {("layers", 1, 3): {}}), "none"
    if cut != "nothing":
        path = "layers.2.feed_forward" if cut == "network" else "layers.2.attention"
        module = student.get_submodule(path)
        units = neurons_of(module) if cut == "network" else heads_of(module)
        assert units is not None
        narrowed(student, path, units)
    report = expect_the_teachers(teacher, student, z_image_lokr(teacher), path)
    assert (path.replace("layers.2", "layers.4") in report.lost) == (cut != "nothing")


def flux2_tensors(kind: str) -> dict[str, Tensor]:
    """An adapter for the fused projections and more, as BFL and kohya name them."""
    tensors: dict[str, Tensor] = {}
    layers = {"double_blocks": (("img_attn.qkv", 96, 32), ("txt_attn.qkv", 96, 32), ("img_attn.proj", 32, 32)),
              "single_blocks": (("linear2", 32, 128),)}  # fmt: skip
    for blocks, parts in layers.items():
        for i in range(4):
            for number, (part, rows, columns) in enumerate(parts):
                seed, base = 10 * i + number, f"diffusion_model.{blocks}.{i}.{part}"
                if kind == "lokr":
                    tensors |= {
                        f"{base}.lokr_w1": noise(4, 4, seed=seed),
                        f"{base}.lokr_w2": noise(rows // 4, columns // 4, seed=seed + 100),
                        f"{base}.alpha": torch.tensor(1e10),
                    }
                    continue
                down, up = noise(2, columns, seed=seed), noise(rows, 2, seed=seed + 100)
                if kind == "bfl":
                    tensors |= {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
                else:
                    base = f"lora_unet_{blocks}_{i}_{part.replace('.', '_')}"
                    tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up,
                                f"{base}.alpha": torch.tensor(1.0)}  # fmt: skip
    return tensors


@pytest.mark.parametrize("kind", ["lokr", "bfl", "kohya"])
def test_flux2_by_all_names(kind: str) -> None:
    teacher = flux2()
    columns = teacher.single_transformer_blocks[0].attn.to_out.in_features
    assert columns == 128
    student = student_of(teacher, {(DUAL, 1, 2): {}, (SINGLE, 0, 1): {}})
    expect_the_teachers(teacher, student, flux2_tensors(kind))


def dora(teacher: Any, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """A DoRA that does nothing: B is zero, and the magnitudes are those of the teacher's rows."""
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(teacher.transformer_blocks):
        for part in parts:
            weight, base = block.get_submodule(part).weight, f"transformer.{DUAL}.{index}.{part}"
            rows = len(weight)
            tensors |= {
                f"{base}.lora_A.weight": noise(2, weight.shape[1]), f"{base}.lora_B.weight": torch.zeros(rows, 2),
                f"{base}.lora_magnitude_vector": weight.norm(dim=1),
            }  # fmt: skip
    return tensors


@torch.no_grad()
def test_a_dora_is_left_out_where_columns_are_gone_and_cut_where_rows_are() -> None:
    teacher = tiny_flux(5, 1)
    student = student_of(teacher, {(DUAL, 1, 3): {}})
    units = neurons_of(student.transformer_blocks[2].ff)
    assert units is not None
    narrowed(student, f"{DUAL}.2.ff", units)
    before = student(**flux_call(), return_dict=False)[0]
    report = load_lora(pipe_of(student), dora(teacher, ("attn.to_q", "ff.net.0.proj", "ff.net.2")))
    torch.testing.assert_close(student(**flux_call(), return_dict=False)[0], before, atol=1e-5, rtol=1e-4)
    assert f"{DUAL}.4.ff" in report.lost and f"{DUAL}.0.ff" not in report.lost
    assert any("2.ff.net.0.proj" in key for key in report.cut)
    assert not any("2.ff.net.2" in key for key in report.mapped.values())


def test_a_loha_is_refused_in_one_line(tmp_path: Path) -> None:
    base = "diffusion_model.layers.0.attention.to_q"
    tensors = {f"{base}.hada_w{n}_{side}": torch.ones(2, 2) for n in (1, 2) for side in "ab"}
    save_file(tensors, tmp_path / "loha.safetensors")
    for source in (tensors, tmp_path / "loha.safetensors"):
        with pytest.raises(UserError, match="is a LoHa, which diffusers does not read"):
            load_lora(pipe_of(student_of(z_image(), {("layers", 1, 3): {}})), source)


def test_the_innermost_smaller_module_decides() -> None:
    """A text stream of two linear maps has no output layer, whatever became of the attention around it."""
    units = heads_of(tiny_qwen(1).transformer_blocks[0].attn)
    assert units is not None
    replaced = {f"{DUAL}.0.attn": units.part([0]), f"{DUAL}.0.attn.to_add_out": {"kind": "no_output", "size": 0}}
    found = fit_replaced(torch.ones(2, 32), f"{DUAL}.0.attn.to_add_out.lora_A.weight", replaced)
    assert found == (None, f"{DUAL}.0.attn.to_add_out", False)
