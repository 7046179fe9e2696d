"""8-bit weights after pruning: quantise, save, load, compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_controlnet_bridge import exported, run_example  # noqa: F401

pytest.importorskip("torchao")


def test_int8_after_pruning(exported: Path, tmp_path: Path, record_property) -> None:  # noqa: F811
    from diffusers import DiffusionPipeline

    folder = tmp_path / "int8"
    run_example("int8", exported, tmp_path / "out.png", "--save", str(folder))
    full = DiffusionPipeline.from_pretrained(exported)
    quantised = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    weight = quantised.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__name__ != "Parameter"
    assert quantised.transformer.config["_ppcl"]["kept_blocks"] == full.transformer.config["_ppcl"]["kept_blocks"]
    draw = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    first, second = (p("red cat", **draw, generator=torch.Generator().manual_seed(0)).images for p in (full, quantised))
    error = ((first - second).norm() / first.norm()).item()
    record_property("relative_error", error)
    assert 0 < error < 0.02, error
    sizes = [sum(f.stat().st_size for f in (x / "transformer").glob("*.safetensors")) for x in (exported, folder)]
    assert sizes[1] < 0.5 * sizes[0]
