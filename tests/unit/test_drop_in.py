"""A compressed transformer (fewer blocks, smaller modules) under everything that diffusers does to its own classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, TorchAoConfig
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import attention_backend
from test_controlnet_bridge import by_hand, qwen_controlnet, residuals
from test_lora_bridge import add_by_hand, lora_for, named
from tiny_compressed import CALLS, QWEN, bundle_for, compressed, teacher_for, velocity_of
from tiny_models import DUAL, SINGLE
from tiny_pipeline import tiny_qwen_pipeline
from torch import nn

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known to diffusers
from ppcl.pipelines import attach_controlnet, load_lora
from ppcl.student.bundle import build_student
from ppcl.teacher.families import adapter_for

FAMILIES = ("qwen", "flux")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate offloads to a GPU")]
EXACT: dict[str, float] = {"atol": 0, "rtol": 0}
LOADED: dict[str, float] = {"atol": 1e-6, "rtol": 1e-5}  # reloaded weights lie elsewhere in memory


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# Files and copies


def test_it_is_smaller_and_of_another_class_that_is_still_the_teachers(family: str) -> None:
    teacher, student = teacher_for(family), compressed(family)
    assert isinstance(student, type(teacher))
    assert type(student).__name__ == f"PPCL{type(teacher).__name__}"
    assert student.config["pruning"]
    assert relative(velocity_of(student, family), velocity_of(teacher, family)) > 0.01


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_saved_loaded_saved_again_and_copied(family: str, shards: str | None, tmp_path: Path) -> None:
    student = compressed(family)
    expected = velocity_of(student, family)
    options = {"max_shard_size": shards} if shards else {}
    student.save_pretrained(tmp_path / "1", **options)
    loaded, info = type(student).from_pretrained(tmp_path / "1", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert (len(list((tmp_path / "1").glob("*.safetensors"))) > 1) == bool(shards)
    loaded.save_pretrained(tmp_path / "2", **options)
    again = type(student).from_pretrained(tmp_path / "2")
    assert (tmp_path / "1" / "config.json").read_text().count("low_rank") >= 3
    for model in (loaded, again, copy.deepcopy(again)):
        torch.testing.assert_close(velocity_of(model, family), expected, **LOADED)
        assert model.config["pruning"] == student.config["pruning"]
    other = type(student).from_config(student.config)  # a config alone builds it, with other weights
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in student.named_parameters()}


def test_half_precision(family: str, tmp_path: Path) -> None:
    student = compressed(family)
    expected = velocity_of(student, family)
    student.save_pretrained(tmp_path)
    half = type(student).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in CALLS[family]().items()}  # fmt: skip
    with torch.no_grad():
        found = half(**call, return_dict=False)[0]
    assert 0 < relative(found, expected) < 0.02


def draw(pipe: Any, steps: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found: torch.Tensor = pipe(
        "red cat", negative_prompt=" ", true_cfg_scale=2.0, height=16, width=16, num_inference_steps=steps,
        generator=generator, output_type="latent",
    ).images  # fmt: skip
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole compressed pipeline on disk."""
    pipe = tiny_qwen_pipeline(num_layers=6)
    teacher = pipe.transformer.eval().requires_grad_(False)
    pipe.register_modules(transformer=build_student(teacher, adapter_for(teacher), bundle_for(teacher, QWEN)))
    folder = tmp_path_factory.mktemp("drop-in") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(exported: Path) -> Any:
    made = DiffusionPipeline.from_pretrained(exported)
    made.set_progress_bar_config(disable=True)
    return made


def test_whole_pipeline_reloads_from_its_own_copy(pipe: Any, tmp_path: Path) -> None:
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is type(pipe.transformer)
    torch.testing.assert_close(draw(again), expected, **LOADED)


# Caches


class Counter:
    """Counts the calls of modules."""

    def __init__(self, *modules: nn.Module) -> None:
        self.calls = 0
        for module in modules:
            original = module.forward
            module.forward = self._counted(original)  # type: ignore[method-assign]

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(*args, **kwargs)

        return forward


def blocks_of(student: Any) -> Iterator[nn.Module]:
    for name in (DUAL, SINGLE):
        yield from getattr(student, name, ())


def steps_of(student: Any, family: str, count: int = 4) -> list[torch.Tensor]:
    """A trajectory that does not move, so that what a cache repeats is right."""
    found = []
    with student.cache_context("cond"):
        for step in range(count):
            CLOCK[0] = 900 if step < 2 else 500
            found.append(velocity_of(student, family))
    return found


def attention_of(student: Any) -> list[nn.Module]:
    return [block.attn for block in blocks_of(student)]


CLOCK = [900]
MIDDLE = {"spatial_attention_timestep_skip_range": (0, 800), "current_timestep_callback": lambda: CLOCK[0]}
# How each skips work, and where. Not here: SeaCache (videos) and TextKVCache (NucleusMoE), which know neither family.
CACHES: dict[str, tuple[Any, Any]] = {
    "first block": (FirstBlockCacheConfig(threshold=0.1), blocks_of),
    "mag": (
        MagCacheConfig(threshold=1.0, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=4,
                       mag_ratios=torch.ones(4)),
        blocks_of,
    ),
    "taylorseer": (
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32),
        lambda student: [a.to_q for a in attention_of(student)],
    ),
    "pyramid": (
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **MIDDLE),
        lambda student: [a.to_q for a in attention_of(student)],
    ),
    "faster": (
        FasterCacheConfig(
            spatial_attention_block_skip_range=2, is_guidance_distilled=True, tensor_format="BCHW", **MIDDLE
        ),
        lambda student: [a.to_q for a in attention_of(student)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_work_and_say_the_same_where_nothing_moves(family: str, name: str) -> None:
    config, counted = CACHES[name]
    expected = velocity_of(compressed(family), family)
    student = compressed(family)
    counter = Counter(*counted(student))
    whole = 4 * len(list(counted(student)))
    student.enable_cache(copy.copy(config))
    for found in steps_of(student, family):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert 0 < counter.calls < whole
    student.disable_cache()
    counter.calls = 0
    torch.testing.assert_close(velocity_of(student, family), expected, **EXACT)
    assert counter.calls == whole / 4


def test_a_cache_that_may_miss_nothing_misses_nothing(family: str) -> None:
    """The same hooks on inputs that move: with no tolerance, every step is the plain model's."""
    plain, student = compressed(family), compressed(family)
    student.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with student.cache_context("cond"):
        for seed in range(3):
            found, expected = (velocity_of(m, family, seed=seed) for m in (student, plain))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Memory


def test_group_offload(family: str) -> None:
    for kind in ("block_level", "leaf_level"):
        student = compressed(family)
        expected = velocity_of(student, family)
        student.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind,
            **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
        )  # fmt: skip
        torch.testing.assert_close(velocity_of(student, family), expected, **EXACT)


@pytest.mark.parametrize("how", [pytest.param("model", marks=needs_gpu), pytest.param("sequential", marks=needs_gpu)])
def test_offload_of_the_pipeline(pipe: Any, how: str) -> None:
    expected = draw(copy.deepcopy(pipe).to("cuda"))
    getattr(pipe, f"enable_{how}_cpu_offload")()
    assert relative(draw(pipe), expected) < 1e-4
    assert {p.device.type for p in pipe.transformer.parameters()} <= {"cpu", "meta"}


def test_accelerate_hooks_on_every_leaf(family: str) -> None:
    """What sequential offload does, with the CPU for a GPU: each leaf's weights come from a map when it is called."""
    from accelerate import cpu_offload

    student = compressed(family)
    expected = velocity_of(student, family)
    cpu_offload(student, torch.device("cpu"))
    assert all(p.is_meta for p in student.parameters())
    torch.testing.assert_close(velocity_of(student, family), expected, **EXACT)


def test_layerwise_casting_to_8_bit_floats(family: str) -> None:
    student = compressed(family)
    expected = velocity_of(student, family)
    student.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = dict(student.named_parameters())
    for path in student.config["pruning"]:  # the smaller modules are stored small, too
        casts = [p for n, p in stored.items() if n.startswith(f"{path}.")]
        assert casts and ({p.dtype for p in casts} == {torch.float8_e4m3fn}) == ("norm" not in path)
    assert 0 < relative(velocity_of(student, family), expected) < 0.1


def test_int8_of_torchao(family: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    student = compressed(family)
    expected = velocity_of(student, family)
    student.save_pretrained(tmp_path / "full")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    small = type(student).from_pretrained(tmp_path / "full", quantization_config=settings, dtype=torch.float32)
    small.save_pretrained(tmp_path / "int8")
    again = type(student).from_pretrained(tmp_path / "int8", dtype=torch.float32)
    for model in (small, again):
        path, part = next((p, v) for p, v in model.config["pruning"].items() if v["kind"] == "low_rank")
        assert type(model.get_submodule(f"{path}.down").weight).__name__ != "Parameter", part
        assert 0 < relative(velocity_of(model, family), expected) < 0.02


# Speed


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(family: str, backend: str) -> None:
    student = compressed(family)
    expected = velocity_of(student, family)
    with attention_backend("native"):  # diffusers makes the backend of one model everyone's
        student.set_attention_backend(backend)
        assert {str(b.attn.processor._attention_backend.value) for b in blocks_of(student)} == {backend}
        torch.testing.assert_close(velocity_of(student, family), expected, atol=1e-5, rtol=1e-5)


def test_fused_projections(family: str) -> None:
    student = compressed(family)
    expected = velocity_of(student, family)
    student.fuse_qkv_projections()
    stock = teacher_for(family)
    stock.fuse_qkv_projections()  # of Qwen-Image's attention diffusers fuses nothing

    def fused(model: Any) -> set[bool]:
        return {bool(b.attn.fused_projections) for b in blocks_of(model)}

    assert fused(student) == fused(stock) == {family == "flux"}
    torch.testing.assert_close(velocity_of(student, family), expected, atol=1e-5, rtol=1e-5)
    student.unfuse_qkv_projections()
    torch.testing.assert_close(velocity_of(student, family), expected, **EXACT)


def test_compiled_blocks(family: str) -> None:
    """One graph a distinct block: kept blocks share one, every other shape costs one more."""
    student = compressed(family)
    expected = velocity_of(student, family)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(cache_size_limit=16):  # the name that all versions of torch know
        student.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(velocity_of(student, family), expected, atol=1e-5, rtol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 3 < graphs <= len(list(blocks_of(student)))
    torch._dynamo.reset()


# Training, and what was made for the teacher


def test_gradient_checkpointing(family: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        student = compressed(family).train().requires_grad_(True)
        if checkpointing:
            student.enable_gradient_checkpointing()
            assert student.is_gradient_checkpointing
        student(**CALLS[family](), return_dict=False)[0].square().mean().backward()
        return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}

    first, second = gradients(False), gradients(True)
    assert first.keys() == second.keys()
    assert any("down" in name for name in first)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-7, rtol=1e-4, msg=name)


LAYERS = ("attn.to_q", "attn.to_out.0", "txt_mlp.net.2")


def test_lora_through_the_bridge_and_its_scale() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    lora = lora_for(teacher_for("qwen"), LAYERS)
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, compressed("qwen"))
    bare = velocity_of(pipe.transformer, "qwen")
    report = load_lora(pipe, lora, adapter_name="style")
    assert f"{DUAL}.4.txt_mlp" in report.lost
    fitting = {k: v for k, v in lora.items() if "blocks.4.txt_mlp" not in k}
    for weight in (1.0, 0.5):
        reference = compressed("qwen")
        add_by_hand(reference, fitting, named({0: 0, 3: 2, 4: 3, 5: 4}), lambda name, weight=weight: weight)
        pipe.set_adapters("style", weight)
        expected = velocity_of(reference, "qwen")
        assert relative(expected, bare) > 0.01
        torch.testing.assert_close(velocity_of(pipe.transformer, "qwen"), expected, atol=1e-5, rtol=1e-5)
    pipe.unload_lora_weights()
    torch.testing.assert_close(velocity_of(pipe.transformer, "qwen"), bare, atol=1e-5, rtol=1e-5)


def test_controlnet_through_the_bridge() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, compressed("qwen"))
    samples = residuals(3)
    at = [samples[i // 2] for i in range(6)]
    sites = {DUAL: [at[0], at[1] + at[2], at[3], at[4], at[5]]}
    expected = by_hand(pipe.transformer, CALLS["qwen"](), sites)
    attach_controlnet(pipe, qwen_controlnet())
    found = velocity_of(pipe.transformer, "qwen", controlnet_block_samples=samples)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert relative(found, velocity_of(compressed("qwen"), "qwen")) > 0.01


def test_other_pipelines_around_the_same_transformer(pipe: Any) -> None:
    from diffusers import QwenImageImg2ImgPipeline

    other = QwenImageImg2ImgPipeline.from_pipe(pipe, transformer=pipe.transformer)
    assert other.transformer is pipe.transformer
    assert SimpleNamespace(**other.components).vae is pipe.vae
