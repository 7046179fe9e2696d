"""A tiny random model and a batch of two inputs for the supported classes that draw videos."""

from __future__ import annotations

import torch
from tiny_base import STEPS, TEXT, make, text_mask
from torch import randn


def hunyuan_video():
    model = make(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
        num_layers=4, num_single_layers=5, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=24, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 1, 2, 2), "timestep": STEPS, "encoder_hidden_states": randn(TEXT),
        "encoder_attention_mask": text_mask(torch.long), "pooled_projections": randn(2, 8),
        "guidance": torch.tensor([3.5, 3.5]),
    }  # fmt: skip


def hunyuan_video15():
    model = make(
        "HunyuanVideo15Transformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=5, num_refiner_layers=1, text_embed_dim=24, text_embed_2_dim=12,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 1, 2, 2), "timestep": STEPS.float(), "encoder_hidden_states": randn(TEXT),
        "encoder_attention_mask": text_mask(), "encoder_hidden_states_2": randn(2, 3, 12),
        "encoder_attention_mask_2": torch.ones(2, 3, dtype=torch.bool), "image_embeds": torch.zeros(2, 3, 8),
    }  # fmt: skip


def mochi():
    model = make(
        "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=6,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=24, time_embed_dim=4, max_sequence_length=5,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 2, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def cogvideox():
    model = make(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=24, num_layers=5, sample_width=4, sample_height=4, sample_frames=5,
        patch_size=2, temporal_compression_ratio=4, max_text_seq_length=5,
    )  # fmt: skip
    return model, {"hidden_states": randn(2, 2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS}


def sana_video():
    model = make(
        "SanaVideoTransformer3DModel", in_channels=4, out_channels=4, num_layers=5, attention_head_dim=12,
        num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=24, sample_size=4,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 2, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def ltx():
    model = make(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=5, caption_channels=24,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 8, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "encoder_attention_mask": text_mask(), "num_frames": 2, "height": 2, "width": 2,
    }  # fmt: skip


def wan_like(name, frames=2, **config):
    model = make(
        name, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=16, ffn_dim=32, num_layers=5, rope_max_seq_len=32, **config,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, frames, 4, 4), "timestep": STEPS, "encoder_hidden_states": randn(TEXT),
    }  # fmt: skip


def wan():
    return wan_like("WanTransformer3DModel")


def skyreels():
    return wan_like("SkyReelsV2Transformer3DModel")


def chronoedit():
    model, inputs = wan_like("ChronoEditTransformer3DModel", image_dim=8, added_kv_proj_dim=24)
    return model, {**inputs, "encoder_hidden_states_image": randn(2, 257, 8)}


def kandinsky5():
    model = make(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=24, in_text_dim2=8, time_dim=16,
        out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=2, num_visual_blocks=5,
        axes_dims=(2, 2, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 1, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "pooled_projections": randn(2, 8), "visual_rope_pos": [torch.arange(1), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(5),
    }  # fmt: skip


def allegro():
    model = make(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        num_layers=5, cross_attention_dim=24, sample_width=4, sample_height=4, sample_frames=2, caption_channels=24,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 2, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "attention_mask": torch.ones(2, 2, 4, 4), "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def cosmos():
    model = make(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=5, mlp_ratio=2.0, text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 8, 8), patch_size=(1, 2, 2),
        concat_padding_mask=True, extra_pos_embed_type="learnable",
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 2, 4, 4), "timestep": STEPS, "encoder_hidden_states": randn(TEXT),
        "padding_mask": torch.zeros(1, 1, 4, 4), "fps": 30,
    }  # fmt: skip
