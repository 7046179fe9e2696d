"""A tiny random model and a batch of two inputs for every supported class, with diffusers' own classes."""

from __future__ import annotations

import diffusers
import torch
from torch import randn

TIMES = torch.tensor([0.3, 0.7])
STEPS = torch.tensor([300, 700])
TEXT = (2, 5, 24)  # batch, tokens, features


def make(name, **config):
    model = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # modulations start at zero, and a fresh block would do nothing
                parameter.normal_(std=0.1)
    return model


def text_mask(dtype=torch.bool):
    mask = torch.ones(2, 5, dtype=dtype)
    mask[0, 3:] = 0
    return mask


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


def cog_inputs():
    pair = torch.tensor([[8, 8], [8, 8]])
    return {
        "hidden_states": randn(2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "original_size": pair, "target_size": pair, "crop_coords": torch.zeros(2, 2, dtype=torch.long),
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


def cogvideox():
    model = make(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=24, num_layers=5, sample_width=4, sample_height=4, sample_frames=5,
        patch_size=2, temporal_compression_ratio=4, max_text_seq_length=5,
    )  # fmt: skip
    return model, {"hidden_states": randn(2, 2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS}


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


def lumina2():
    model = make(
        "Lumina2Transformer2DModel", sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=5,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64), cap_feat_dim=24,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 4, 4), "timestep": TIMES, "encoder_hidden_states": randn(TEXT),
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


def z_image():
    model = make(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=5, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {"x": [randn(4, 1, 4, 4), randn(4, 1, 4, 4)], "t": TIMES, "cap_feats": [randn(5, 24), randn(7, 24)]}


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
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=3,
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
        intermediate_size=32, adaln_dim=8, llm_features_dim=24, mrope_section=(4, 2, 2),
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
        "LuminaNextDiT2DModel", sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=5,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, cross_attention_dim=24,
    )  # fmt: skip
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
