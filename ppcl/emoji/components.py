"""The parts of the embedded teacher: tokenizer, text encoder, transformer, and how they fit."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH = 128
NUM_BLOCKS = 24
VOCABULARY = 3072
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The words of QwenImagePipeline's prompt template; each must become one token, so that its
# prefix has the 34 tokens which the pipeline cuts off.
TEMPLATE_WORDS = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)


def new_tokenizer(captions: Sequence[str]) -> Qwen2Tokenizer:
    """Train a byte-level BPE on the captions and the pipeline's template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([*captions, *[TEMPLATE_WORDS] * 500], trainer)
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    vocabulary = model["vocab"] | {name: len(model["vocab"]) + i for i, name in enumerate(SPECIALS)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[2],
        additional_special_tokens=list(SPECIALS[1:]),
    )


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A two-layer Qwen2.5-VL of width 128; its picture half is as small as its config allows."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def new_transformer(num_blocks: int = NUM_BLOCKS) -> QwenImageTransformer2DModel:
    """Dual-stream blocks of width 128 for 2x2 patches of four latent channels; 24 have 14.4M parameters.

    Modulation and output projections start at zero, as in DiT.
    """
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_blocks,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    heads = [block.img_mod[1] for block in transformer.transformer_blocks]
    heads += [block.txt_mod[1] for block in transformer.transformer_blocks]
    for linear in [*heads, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Plain flow matching: no timestep shift, since the pictures are small."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def assemble(
    vae: AutoencoderKLQwenImage,
    tokenizer: Qwen2Tokenizer,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    transformer: QwenImageTransformer2DModel,
) -> QwenImagePipeline:
    """Put the parts into the stock pipeline."""
    pipeline = QwenImagePipeline(
        scheduler=new_scheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pack(latents: Tensor) -> Tensor:
    """Pack (B, C, H, W) latents into (B, H/2 * W/2, 4C) tokens, as QwenImagePipeline does."""
    batch, channels, height, width = latents.shape
    tokens = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height // 2 * (width // 2), channels * 4)


def encode_pictures(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """Encode (N, 3, 1, H, W) pictures in [-1, 1] to normalised latents (N, C, H/4, W/4)."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean[:, :, 0] for part in torch.split(pictures, 64)])
    return (latents - mean) / std
