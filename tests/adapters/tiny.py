"""A tiny random model and a batch of two inputs for every supported class, with diffusers' own classes."""

from __future__ import annotations

import torch
from tiny_base import STEPS, TEXT, TIMES, cog_inputs, make, text_mask
from tiny_video import (
    allegro,
    chronoedit,
    cogvideox,
    cosmos,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    mochi,
    sana_video,
    skyreels,
    wan,
)
from torch import randn


def qwen():
    model = make(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=5,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 16), "encoder_hidden_states": randn(TEXT),
        "encoder_hidden_states_mask": text_mask(), "timestep": TIMES, "img_shapes": [[(1, 2, 2)]] * 2,
    }  # fmt: skip


def flux_like(name, inputs, **config):
    model = make(
        name, patch_size=1, in_channels=16, num_layers=4, num_single_layers=5, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 16), "encoder_hidden_states": randn(TEXT), "timestep": TIMES,
        "img_ids": randn(4, 3), "txt_ids": torch.zeros(5, 3), **inputs,
    }  # fmt: skip


def flux():
    inputs = {"pooled_projections": randn(2, 16), "guidance": torch.tensor([3.5, 3.5])}
    return flux_like("FluxTransformer2DModel", inputs, pooled_projection_dim=16, guidance_embeds=True)


def bria():
    return flux_like("BriaTransformer2DModel", {})


def longcat():
    return flux_like("LongCatImageTransformer2DModel", {}, pooled_projection_dim=16)


def ovis():
    return flux_like("OvisImageTransformer2DModel", {}, out_channels=16)


def flux2():
    model = make(
        "Flux2Transformer2DModel", in_channels=16, num_layers=4, num_single_layers=5, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 16), "encoder_hidden_states": randn(TEXT), "timestep": TIMES,
        "img_ids": torch.arange(16.0).view(4, 4), "txt_ids": torch.zeros(5, 4), "guidance": torch.tensor([3.5, 3.5]),
    }  # fmt: skip


def sd3(**config):
    model = make(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=6,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=24,
        pooled_projection_dim=16, pos_embed_max_size=8, qk_norm="rms_norm", **config,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "pooled_projections": randn(2, 16),
    }  # fmt: skip


def sd35_medium():
    return sd3(dual_attention_layers=(0, 1, 2))


def auraflow():
    model = make(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=4,
        num_single_dit_layers=5, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
        caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return model, {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(TEXT), "timestep": TIMES}


def hunyuan_image():
    model = make(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        num_layers=4, num_single_layers=5, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=24,
        rope_axes_dim=(4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 2, 2), "timestep": STEPS.float(), "encoder_hidden_states": randn(TEXT),
        "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def cogview4():
    model = make(
        "CogView4Transformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return model, cog_inputs()


def cogview3():
    model = make(
        "CogView3PlusTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=5,
        attention_head_dim=8, num_attention_heads=2, text_embed_dim=24, time_embed_dim=8, condition_dim=4,
        pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return model, cog_inputs()


def pixart():
    model = make(
        "PixArtTransformer2DModel", sample_size=4, num_layers=5, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=4, cross_attention_dim=16, out_channels=8, caption_channels=24,
        use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "encoder_attention_mask": text_mask(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sana():
    model = make(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_layers=5, attention_head_dim=8,
        num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=24, sample_size=4,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def lumina2():
    model = make(
        "Lumina2Transformer2DModel", sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=5,
        num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64), cap_feat_dim=24,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "timestep": TIMES, "encoder_hidden_states": randn(TEXT),
        "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def z_image():
    model = make(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=5, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {"x": [randn(4, 1, 4, 4), randn(4, 1, 4, 4)], "t": TIMES, "cap_feats": [randn(5, 24), randn(7, 24)]}


def prx():
    model = make(
        "PRXTransformer2DModel", in_channels=4, patch_size=2, context_in_dim=24, hidden_size=16, mlp_ratio=2.0,
        num_heads=2, depth=5, axes_dim=[4, 4],
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "timestep": TIMES, "encoder_hidden_states": randn(TEXT),
        "attention_mask": text_mask(),
    }  # fmt: skip


def krea2():
    model = make(
        "Krea2Transformer2DModel", in_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=3,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4), "encoder_hidden_states": randn(2, 5, 3, 24), "timestep": TIMES,
        "position_ids": torch.zeros(9, 3), "encoder_attention_mask": text_mask(),
    }  # fmt: skip


def ideogram4():
    model = make(
        "Ideogram4Transformer2DModel", in_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=48, adaln_dim=8, llm_features_dim=24, mrope_section=(4, 2, 2),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 9, 4), "timestep": TIMES, "encoder_hidden_states": randn(2, 9, 24),
        "position_ids": torch.zeros(2, 9, 3, dtype=torch.long), "segment_ids": torch.zeros(2, 9, dtype=torch.long),
        "indicator": torch.tensor([[3] * 5 + [2] * 4] * 2),
    }  # fmt: skip


def joyimage():
    model = make(
        "JoyImageEditTransformer3DModel", in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24,
        num_layers=5, rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 1, 4, 4), "timestep": STEPS, "encoder_hidden_states": randn(TEXT),
    }  # fmt: skip


def glm_image():
    model = make(
        "GlmImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=24, time_embed_dim=8, condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "prior_token_id": torch.zeros(2, 4, dtype=torch.long), "prior_token_drop": torch.zeros(2, dtype=torch.bool),
        "target_size": torch.tensor([[8.0, 8.0]] * 2), "crop_coords": torch.zeros(2, 2),
    }  # fmt: skip


def lumina_next():
    model = make(
        "LuminaNextDiT2DModel", sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=5,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, cross_attention_dim=24,
    )  # fmt: skip
    torch.nn.init.zeros_(model.pad_token)  # diffusers leaves it as memory happens to be
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "timestep": TIMES, "encoder_hidden_states": randn(TEXT),
        "encoder_mask": text_mask(), "image_rotary_emb": randn(16, 16, 4), "cross_attention_kwargs": {},
    }  # fmt: skip


def qwen21():
    model = make(
        "QwenImage21Transformer2DModel", in_channels=16, out_channels=16, num_layers=5, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=24, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 16), "encoder_hidden_states": randn(TEXT), "timestep": TIMES,
        "img_shapes": [[(1, 2, 2)]] * 2, "img_mask": torch.tensor([[False] * 5 + [True]] * 2),
        "encoder_hidden_states_mask": text_mask(),
    }  # fmt: skip


def ernie():
    model = make(
        "ErnieImageTransformer2DModel", hidden_size=32, num_attention_heads=2, num_layers=5, ffn_hidden_size=48,
        in_channels=4, out_channels=4, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 2, 2), "timestep": STEPS, "text_bth": randn(TEXT),
        "text_lens": torch.tensor([3, 5]),
    }  # fmt: skip


TINY = {
    f.__name__: f
    for f in (
        qwen, flux, bria, longcat, ovis, flux2, sd3, sd35_medium, auraflow, hunyuan_image, hunyuan_video,
        hunyuan_video15, cogview4, cogview3, cogvideox, pixart, sana, sana_video, lumina2, ltx, wan, skyreels,
        chronoedit, kandinsky5, mochi, z_image, allegro, cosmos, prx, krea2, ideogram4, joyimage, glm_image,
        lumina_next, qwen21, ernie,
    )
}  # fmt: skip
