"""Tiny random pipelines of several families, built in memory in a second: no hub, no files."""

from __future__ import annotations

from typing import Any

import torch

ASCII = [chr(code) for code in range(33, 127)]
WIDTH = 32  # of every text encoder but the CLIPs, whose two halves make it up together


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of single characters."""
    from transformers import CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>", *ASCII, *(f"{c}</w>" for c in ASCII)]
    # without model_max_length the pipelines pad to an endless length
    return CLIPTokenizer({name: i for i, name in enumerate(names)}, [], model_max_length=77)


def clip(tokenizer: Any, projected: bool) -> Any:
    """A CLIP text encoder of width 16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_tokenizer() -> Any:
    """A T5 tokenizer of single characters."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in ASCII)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def t5(tokenizer: Any, multilingual: bool = False) -> Any:
    """A T5 (or UMT5) encoder."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config = (UMT5Config if multilingual else T5Config)(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    return (UMT5EncoderModel if multilingual else T5EncoderModel)(config)


def vae(levels: int = 2, **config: Any) -> Any:
    """A picture VAE of four latent channels; each level but the first halves the sides."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels, latent_channels=4, norm_num_groups=2, layers_per_block=1, **config,
    )  # fmt: skip


def flow_scheduler(**config: Any) -> Any:
    """The flow-matching sampler of all families here but PixArt."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _modulated(transformer: Any) -> Any:
    """Fill what starts at zero: a fresh block would otherwise do nothing."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return transformer


def flux() -> Any:
    """FLUX dev: guidance is an input, and there are two block lists."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    decoder = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)
    return FluxPipeline(
        flow_scheduler(use_dynamic_shifting=True), decoder, clip(tokenizer, False), tokenizer, t5(tokenizer_2),
        tokenizer_2, _modulated(transformer),
    )  # fmt: skip


def sd3(with_t5: bool = True) -> Any:
    """Stable Diffusion 3.5, with or without its largest text encoder."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH, pooled_projection_dim=32,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0, 1, 2),
    )  # fmt: skip
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer() if with_t5 else None
    encoders = [clip(tokenizer, True), clip(tokenizer, True), t5(tokenizer_3) if with_t5 else None]
    decoder = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305)
    return StableDiffusion3Pipeline(
        _modulated(transformer), flow_scheduler(shift=3.0), decoder, encoders[0], tokenizer, encoders[1],
        clip_tokenizer(), encoders[2], tokenizer_3,
    )  # fmt: skip


def sd3_without_t5() -> Any:
    """Stable Diffusion 3.5 as people run it on small GPUs."""
    return sd3(with_t5=False)


def pixart() -> Any:
    """PixArt Sigma: one stream, a diffusion sampler, and a variance beside the noise."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=6, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, out_channels=8, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer, t5(tokenizer), vae(levels=4), _modulated(transformer), DPMSolverMultistepScheduler()
    )


def z_image() -> Any:
    """Z-Image: one stream, and a list with one entry a prompt where others have a batch."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    from ppcl.emoji.components import new_tokenizer

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    tokenizer = new_tokenizer(["a red cat", "an old house"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip
    return ZImagePipeline(
        flow_scheduler(shift=3.0), vae(shift_factor=0.1159), text_encoder, tokenizer, _modulated(transformer)
    )


def wan() -> Any:
    """Wan: a video model; guidance calls the transformer twice a step."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=6, rope_max_seq_len=32,
    )  # fmt: skip
    decoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer, t5(tokenizer, multilingual=True), decoder, flow_scheduler(shift=3.0), _modulated(transformer)
    )


PIPELINES = {f.__name__: f for f in (flux, sd3, sd3_without_t5, pixart, z_image, wan)}
