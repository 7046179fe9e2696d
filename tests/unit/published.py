"""The transformer configs of published models, as their config.json files have them; no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN_IMAGE: dict[str, Any] = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
FLUX_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
PUBLISHED = {"Qwen/Qwen-Image": QWEN_IMAGE, "black-forest-labs/FLUX.1-dev": FLUX_DEV}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write ``folder/transformer/config.json``; return ``folder``."""
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder
