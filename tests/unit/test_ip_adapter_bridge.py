"""IP-Adapters of the teacher, and other things that name blocks by number, on compressed pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ordinary_heads import heads_of
from tiny_compressed import bundle_for
from tiny_models import DUAL, SINGLE, flux_call, noise, tiny_flux, tiny_qwen
from torch import Tensor

from ppcl.errors import ModelError, UserError
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import apply_width
from ppcl.pipelines import load_ip_adapter, locate_blocks
from ppcl.student.bundle import build_student
from ppcl.teacher.families import adapter_for

RUN: dict[Any, Any] = {(DUAL, 1, 3): {}}


def student_of(teacher: Any, parts: Any = RUN) -> Any:
    return build_student(teacher, adapter_for(teacher), bundle_for(teacher, parts))


def sd3(**config: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm", **config,
    )  # fmt: skip
    return transformer.eval().requires_grad_(False)


def flux_pipe(transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)


def sd3_pipe(transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = [None] * 7
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), *parts)


def flux_layers(blocks: int) -> dict[str, Any]:
    """An adapter whose layers hold their own number in one place."""
    layers: dict[str, Tensor] = {}
    for i in range(blocks):
        for number, part in enumerate("kv"):
            weight = 0.3 * noise(32, 24, seed=100 + 2 * i + number)
            weight[0, 0] = i
            layers |= {f"{i}.to_{part}_ip.weight": weight, f"{i}.to_{part}_ip.bias": 0.1 * noise(32, seed=i)}
    projection = {"proj.weight": noise(96, 16, seed=1), "proj.bias": noise(96, seed=2)}
    return {"image_proj": projection | {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)},
            "ip_adapter": layers}  # fmt: skip


def flux_numbers(transformer: Any) -> list[int]:
    processors = transformer.attn_processors.values()
    return [round(float(p.to_k_ip[0].weight[0, 0])) for p in processors if hasattr(p, "to_k_ip")]


def sd3_layers(blocks: int) -> dict[str, Tensor]:
    layers: dict[str, Tensor] = {}
    for i in range(blocks):
        layers |= {
            f"{i}.norm_ip.linear.weight": 0.1 * noise(64, 16, seed=i), f"{i}.norm_ip.linear.bias": torch.zeros(64),
            f"{i}.to_k_ip.weight": torch.full((32, 32), float(i)), f"{i}.to_v_ip.weight": noise(32, 32, seed=i),
            f"{i}.norm_q.weight": torch.ones(8), f"{i}.norm_k.weight": torch.ones(8),
            f"{i}.norm_ip_k.weight": torch.ones(8),
        }  # fmt: skip
    return layers


@torch.no_grad()
def with_picture(transformer: Any, picture: bool = True) -> Tensor:
    """FLUX's answer to a picture's embedding."""
    pictures = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [noise(3, 1, 16, seed=9)]}} if picture else {}
    found: Tensor = transformer(**flux_call(), **pictures, return_dict=False)[0]
    return found


def load(pipe: Any, layers: dict[str, Any]) -> tuple[int, ...]:
    name = "image_encoder_pretrained_model_name_or_path"
    return load_ip_adapter(pipe, layers, weight_name="", **{name: None})


def test_flux_layers_go_to_their_blocks_and_come_off_again() -> None:
    pipe = flux_pipe(student_of(tiny_flux(5, 4), {**RUN, (SINGLE, 0, 1): {}}))
    before = with_picture(pipe.transformer, picture=False)
    assert load(pipe, flux_layers(5)) == (0, 2, 4)
    assert flux_numbers(pipe.transformer) == [0, 2, 4]
    assert not torch.equal(with_picture(pipe.transformer), before)
    pipe.set_ip_adapter_scale([0.0, 0.0, 0.0])
    torch.testing.assert_close(with_picture(pipe.transformer), before)
    pipe.unload_ip_adapter()
    assert torch.equal(with_picture(pipe.transformer, picture=False), before)


def test_what_started_elsewhere_takes_the_layer_of_its_start() -> None:
    student = student_of(tiny_flux(5, 4))
    record = dict(student.config["_ppcl"])
    student.register_to_config(_ppcl={**record, "starts": {**record["starts"], DUAL: [None, "last", None]}})
    assert load(flux_pipe(student), flux_layers(5)) == (0, 3, 4)


def test_flux_heads_that_are_gone_take_their_part_of_the_picture_along() -> None:
    """The same as the teacher's whole attention whose dropped heads give nothing, of text, image and adapter."""
    whole, cut = (student_of(tiny_flux(2, 1), {}) for _ in range(2))
    units = heads_of(whole.transformer_blocks[0].attn)
    assert units is not None and units.count == 2
    parts = {f"{DUAL}.0.attn": units.part([1])}
    apply_width(cut, parts)
    compress_class(cut, parts)
    layers = flux_layers(2)
    with pytest.raises(ModelError, match=r"load it with ppcl\.pipelines\.load_ip_adapter"):
        flux_pipe(cut).load_ip_adapter(layers, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    for pipe in (flux_pipe(whole), flux_pipe(cut)):
        load(pipe, layers)
    attention = whole.transformer_blocks[0].attn
    with torch.no_grad():
        for layer in (attention.to_out[0], attention.to_add_out):
            layer.weight[:, :16] = 0
        attention.processor.to_v_ip[0].weight[:16] = 0
        attention.processor.to_v_ip[0].bias[:16] = 0
    torch.testing.assert_close(with_picture(cut), with_picture(whole), atol=1e-5, rtol=1e-4)


def test_sd3_layers_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(sd3())
    units = heads_of(student.transformer_blocks[0].attn)
    assert units is not None
    parts = {f"{DUAL}.0.attn": units.part([0, 3])}
    apply_width(student, parts)
    compress_class(student, parts)
    pipe = sd3_pipe(student)
    monkeypatch.setattr(  # the projection of the pictures needs 64 features a head, and has no block
        type(student), "_convert_ip_adapter_image_proj_to_diffusers", lambda *_: None
    )
    found = load_ip_adapter(pipe, {"image_proj": {}, "ip_adapter": sd3_layers(6)}, image_encoder_folder=None)
    assert found == (0, 2, 4, 5)
    processors = list(student.attn_processors.values())
    assert [round(float(p.to_k_ip.weight[0, 0])) for p in processors] == [0, 2, 4, 5]
    assert processors[0].to_v_ip.weight.shape == (16, 32) and processors[1].to_v_ip.weight.shape == (32, 32)
    call = {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 24), "timestep": torch.ones(2),
        "pooled_projections": noise(2, 16),
    }  # fmt: skip
    student.image_proj = lambda *_: (noise(2, 3, 32), noise(2, 16))
    with torch.no_grad():
        answers = [
            student(**call, joint_attention_kwargs=more, return_dict=False)[0]
            for more in ({"ip_adapter_image_embeds": noise(2, 1, 8)}, None)
        ]
    assert not torch.equal(*answers)


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(UserError, match="has 4 layers, and the teacher had 5 blocks"):
        load(flux_pipe(student_of(tiny_flux(5, 4))), flux_layers(4))
    with pytest.raises(ModelError, match="second attention"):
        load_ip_adapter(sd3_pipe(student_of(sd3(dual_attention_layers=(0, 1)))), {})
    with pytest.raises(ModelError, match="was not compressed"):
        load(flux_pipe(tiny_flux()), flux_layers(3))
    with pytest.raises(ModelError, match="takes no IP-Adapter"):
        load_ip_adapter(SimpleNamespace(transformer=student_of(tiny_qwen(6))))


def test_numbers_of_blocks_are_translated() -> None:
    pipe = SimpleNamespace(transformer=student_of(tiny_flux(6, 4), {(DUAL, 1, 3): {}, (SINGLE, 0, 1): {}}))
    assert locate_blocks(pipe, [0, 1, 4]) == [0, 2]  # one of the run's three is too few
    assert locate_blocks(pipe, range(1, 3)) == [1]
    assert locate_blocks(pipe, [1, 3], SINGLE) == [0, 2]
    with pytest.raises(UserError, match="block 6 of 'transformer_blocks' is not there; the teacher had 6"):
        locate_blocks(pipe, [6])
    with pytest.raises(UserError, match="stack is 'blocks'; expected one of"):
        locate_blocks(pipe, [0], "blocks")


def test_skipped_layers_of_sd3_are_those_that_were_meant() -> None:
    teacher = sd3()
    student = student_of(teacher)
    call = {
        "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 24), "timestep": torch.ones(2),
        "pooled_projections": noise(2, 16),
    }  # fmt: skip
    with torch.no_grad():
        found = student(**call, skip_layers=locate_blocks(SimpleNamespace(transformer=student), [4]))[0]
        bare = student_of(teacher)
        bare.transformer_blocks = torch.nn.ModuleList([bare.transformer_blocks[i] for i in (0, 1, 3)])
        torch.testing.assert_close(found, bare(**call)[0])
