"""A Qwen-Image pipeline of any number of blocks at full width, random bfloat16 weights, written block by block."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 3072  # Qwen-Image's; 24 heads of 128


def write_transformer(folder: Path, num_blocks: int, width: int = WIDTH, text: int = 128, seed: int = 0) -> int:
    """Write a Qwen-Image transformer's folder, a file a block.

    Args:
        folder: Of the pipeline; ``transformer`` is written, and a ``model_index.json`` if there is none.
        num_blocks: N.
        width: Features of a token; a multiple of 128.
        text: Features of a token of the text encoder.
        seed: Fixes the weights.

    Returns:
        Parameters.
    """
    from diffusers import QwenImageTransformer2DModel

    config: dict[str, Any] = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": num_blocks, "attention_head_dim": 128,
        "num_attention_heads": width // 128, "joint_attention_dim": text, "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(**config)
    target = folder / "transformer"
    transformer.save_config(target)
    index = folder / "model_index.json"
    if not index.is_file():
        entry = ["diffusers", type(transformer).__name__]
        index.write_text(json.dumps({"_class_name": "QwenImagePipeline", "transformer": entry}))
    outside = nn.ModuleDict({n: m for n, m in transformer.named_children() if n != "transformer_blocks"})
    parts = [("", outside)] + [(f"transformer_blocks.{i}.", b) for i, b in enumerate(transformer.transformer_blocks)]
    generator, places, total = torch.Generator().manual_seed(seed), {}, 0
    for number, (prefix, part) in enumerate(parts):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        weights = {prefix + name: _random(tensor, generator) for name, tensor in part.state_dict().items()}
        save_file(weights, target / file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file)
        total += sum(tensor.numel() for tensor in weights.values())
        del weights
        gc.collect()
    listing = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))
    return total


def write_pipeline(folder: Path, num_blocks: int, captions: Sequence[str], width: int = WIDTH, seed: int = 0) -> int:
    """Write a whole QwenImagePipeline: that transformer, a tiny text encoder and a tiny VAE (a token is 8 px wide).

    Args:
        folder: Of the pipeline.
        num_blocks: N.
        captions: What the tokenizer is made from.
        width: Features of a token; a multiple of 128.
        seed: Fixes the weights.

    Returns:
        Parameters of the transformer.
    """
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    from ppcl.emoji.components import assemble, new_text_encoder, new_tokenizer

    torch.manual_seed(seed)
    tokenizer = new_tokenizer(captions)
    encoder = new_text_encoder(tokenizer)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    text = int(encoder.config.get_text_config().hidden_size)
    stand_in = QwenImageTransformer2DModel(num_layers=0, num_attention_heads=1, joint_attention_dim=text)
    assemble(vae, tokenizer, encoder, stand_in).save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    return write_transformer(folder, num_blocks, width, text, seed)


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of the size of a fresh layer's; ones for what scales a norm, small numbers for a bias."""
    made = torch.empty(tensor.shape, dtype=torch.bfloat16)
    if tensor.ndim == 1:
        return made.normal_(std=0.02, generator=generator) + float(len(tensor) <= 128)
    return made.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)


def anonymous_bytes(process: int | str = "self") -> int:
    """Anonymous memory of a process: what no file stands behind.

    Raises:
        OSError: There is no such process any more.
        StopIteration: It is ending.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
