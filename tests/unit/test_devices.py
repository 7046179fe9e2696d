"""Devices by name, and memory that processes share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_models import tiny_qwen

from ppcl.common.devices import resolve_device
from ppcl.config import load_config
from ppcl.distill import preparation
from ppcl.run import Run
from ppcl.teacher import loading as teacher_module
from ppcl.training.distributed import Group

if TYPE_CHECKING:
    from ppcl.student.plan import CompressionPlan


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_a_cuda_device_has_its_number(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on it say cuda:1, which is not equal to cuda."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cpu", "auto", torch.float32),
        ("cpu", "bf16", torch.float32),
        ("cuda", "auto", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
    ],
)
def test_a_run_in_fp32_has_a_teacher_in_float32(
    device: str, precision: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Substitutes are float32: without autocast they and a bfloat16 teacher do not go together."""
    given: list[torch.dtype] = []
    monkeypatch.setattr(teacher_module, "load_pipeline", lambda *args, **_: given.append(args[2]))
    run = Run("emoji", tmp_path / "run", load_config([], [f"precision={precision}", "device=cpu", "blocks=resident"]))
    run.device = torch.device(device)
    assert run.teacher is None
    assert given == [expected]


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(preparation, "estimate_distill", lambda *_, **__: {})
    monkeypatch.setattr(preparation, "free_bytes", lambda _: 1200)
    monkeypatch.setattr(preparation, "check_memory", lambda _, __, free: found.append(free))
    states: Any = SimpleNamespace(largest=lambda *_: {}, pieces=lambda *_: 1)
    for local in ("3", "6"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        settings, plan, group = load_config([], []).distill, cast("CompressionPlan", SimpleNamespace()), Group(1, 6)
        preparation.say_memory(tiny_qwen(2), plan, states, settings, "auto", torch.device("cpu"), group)
    assert found == [400, 200]
    assert Group().local_size == 1


def test_blocks_that_stay_do_not_wait_with_the_others() -> None:
    """SD3's last block is no part of a stack, so nothing would bring it to the device."""
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    settings, pipeline = load_config([], ["distill.offload=cpu"]).distill, SimpleNamespace(transformer=transformer)
    preparation.training_transformer(pipeline, "", torch.device("meta"), settings, "auto", 1)
    blocks = [next(block.parameters()).device.type for block in transformer.transformer_blocks]
    assert blocks == ["cpu"] * (len(blocks) - 1) + ["meta"]
