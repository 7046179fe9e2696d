"""Tiny random pipelines of several families, built in memory in a second: no hub, no files."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch

ASCII = [chr(code) for code in range(33, 127)]
WIDTH = 32  # of every text encoder but the CLIPs, whose two halves make it up together
TEXT_TOKENS = 24
PADDED = ("Flux", "FluxKontext", "FluxFill", "FluxControl", "StableDiffusion3", "PixArtSigma", "Wan", "WanImageToVideo")


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of single characters."""
    from transformers import CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>", *ASCII, *(f"{c}</w>" for c in ASCII)]
    # without model_max_length the pipelines pad to an endless length
    return CLIPTokenizer({name: i for i, name in enumerate(names)}, [], model_max_length=TEXT_TOKENS)


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


def flux(kind: str = "FluxPipeline", **config: Any) -> Any:
    """FLUX dev: guidance is an input, and there are two block lists."""
    import diffusers

    config = {"in_channels": 16, "guidance_embeds": True, **config}
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, num_layers=4, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    decoder = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)
    return getattr(diffusers, kind)(
        scheduler=flow_scheduler(use_dynamic_shifting=True), vae=decoder, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=clip(tokenizer, False), text_encoder_2=t5(tokenizer_2), transformer=_modulated(transformer),
    )  # fmt: skip


def schnell() -> Any:
    """FLUX schnell: made for few steps without guidance, which is no input."""
    return flux(guidance_embeds=False)


def flux_kontext() -> Any:
    """FLUX Kontext: edits a picture, and draws without one, too."""
    return flux("FluxKontextPipeline")


def flux_fill() -> Any:
    """FLUX Fill: a picture and a mask, beside the latents in channels."""
    return flux("FluxFillPipeline", in_channels=16 + 16 + 4 * 4, out_channels=16)


def flux_control() -> Any:
    """FLUX Control (depth, canny): a picture beside the latents in channels."""
    return flux("FluxControlPipeline", in_channels=32, out_channels=16)


def qwen_edit(kind: str = "QwenImageEditPipeline", levels: int = 2, width: int = 8) -> Any:
    """Qwen-Image-Edit, its VAE of so many halvings; of a megapixel where :func:`small_sources` is not called."""
    import diffusers
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    from ppcl.emoji.components import new_text_encoder, new_tokenizer

    tokenizer = new_tokenizer(["a red cat", "an old house"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]}
    )
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    sides = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**sides), tokenizer, Qwen2VLVideoProcessor(), chat_template="x")
    text_encoder = new_text_encoder(tokenizer)
    text_encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=128, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=width, z_dim=4, dim_mult=[1] * (levels + 1), num_res_blocks=1, temperal_downsample=[False] * levels,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return getattr(diffusers, kind)(
        scheduler=flow_scheduler(), vae=decoder, text_encoder=text_encoder, tokenizer=tokenizer,
        processor=processor, transformer=_modulated(transformer),
    )  # fmt: skip


def small_sources(monkeypatch: Any) -> None:
    """Qwen-Image-Edit brings every source to a megapixel; here to 32 x 32 pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (32, 32))


def short_texts(monkeypatch: Any) -> None:
    """Pipelines pad texts to hundreds of tokens, which is most of what a tiny model works on; here to a few."""
    import diffusers

    for name in PADDED:
        call = inspect.unwrap(getattr(diffusers, f"{name}Pipeline").__call__)
        optional = [p for p in inspect.signature(call).parameters.values() if p.default is not p.empty]
        assert "max_sequence_length" in {p.name for p in optional}, name
        defaults = tuple(TEXT_TOKENS if p.name == "max_sequence_length" else p.default for p in optional)
        monkeypatch.setattr(call, "__defaults__", defaults)


def qwen_edit_plus() -> Any:
    """Qwen-Image-Edit-Plus: several pictures beside one prompt."""
    return qwen_edit("QwenImageEditPlusPipeline")


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


def z_image(heads: int = 2) -> Any:
    """Z-Image: one stream, and a list with one entry a prompt where others have a batch."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    from ppcl.emoji.components import new_tokenizer

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16 * heads, n_layers=6, n_refiner_layers=1, n_heads=heads, n_kv_heads=heads,
        cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
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


def flux2() -> Any:
    """FLUX.2: one modulation for all blocks of a kind, fused networks, and pictures to start from if there are any."""
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
        PreTrainedTokenizerFast,
    )

    from ppcl.emoji.components import new_tokenizer

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    # where the words of what stands before every prompt are no tokens, it alone is longer than what is read
    trained = new_tokenizer(["a red cat", *[SYSTEM_MESSAGE] * 500])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token=trained.pad_token)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    words = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=8, chat_template=words)
    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    picture = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(text_config=text, vision_config=picture, image_token_index=image_token)
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    text_encoder = Mistral3ForConditionalGeneration(config)
    return Flux2Pipeline(flow_scheduler(), decoder, text_encoder, processor, _modulated(transformer))


def hunyuan_video() -> Any:
    """HunyuanVideo: a video model of dual- and single-stream blocks, which gets its text with a mask."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel

    from ppcl.emoji.components import new_tokenizer

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=4, num_single_layers=6,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH,
        pooled_projection_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    decoder = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    tokenizer = new_tokenizer(["a red cat", *[DEFAULT_PROMPT_TEMPLATE["template"]] * 500])
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
            num_attention_heads=2, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    tokenizer_2 = clip_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder, tokenizer, _modulated(transformer), decoder, flow_scheduler(shift=7.0), clip(tokenizer_2, False),
        tokenizer_2,
    )  # fmt: skip


def _wan_transformer(in_channels: int = 4) -> Any:
    from diffusers import WanTransformer3DModel

    return _modulated(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=4,
            text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=6, rope_max_seq_len=32,
        )
    )  # fmt: skip


def wan(kind: str = "WanPipeline", in_channels: int = 4, **parts: Any) -> Any:
    """Wan: a video model; guidance calls the transformer twice a step."""
    import diffusers
    from diffusers import AutoencoderKLWan

    decoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    return getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=t5(tokenizer, multilingual=True), vae=decoder,
        scheduler=flow_scheduler(shift=3.0), transformer=_wan_transformer(in_channels), **parts,
    )  # fmt: skip


def wan_two_experts() -> Any:
    """Wan 2.2: one transformer for much noise, one for little."""
    return wan(transformer_2=_wan_transformer(), boundary_ratio=0.7)


def wan_image_to_video() -> Any:
    """Wan image to video: the first frame and a mask of frames beside the latents in channels."""
    return wan("WanImageToVideoPipeline", in_channels=12)


def ltx_image_to_video() -> Any:
    """LTX image to video: the first frame's tokens have a timestep of their own."""
    from diffusers import AutoencoderKLLTXVideo, LTXImageToVideoPipeline, LTXVideoTransformer3DModel

    decoder = AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_block_out_channels=(8,) * 4, decoder_layers_per_block=(1,) * 5, decoder_inject_noise=(False,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    decoder.use_framewise_encoding = decoder.use_framewise_decoding = False
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=6, caption_channels=WIDTH,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    return LTXImageToVideoPipeline(flow_scheduler(), decoder, t5(tokenizer), tokenizer, _modulated(transformer))


def picture_pairs(folder: Any) -> None:
    """Write nine pairs of pictures, and what makes the second of the first."""
    from PIL import Image

    rows = []
    for number in range(9):
        for kind, shade in (("before", 0), ("after", 255)):
            Image.new("RGB", (40, 48), (number * 20, 90, shade)).save(folder / f"{kind}-{number}.png")
        names = {"file_name": f"after-{number}.png", "source": f"before-{number}.png"}
        rows.append({**names, "text": f"make it {number} cats"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


PICTURED = {
    f.__name__: f
    for f in (flux_kontext, flux_fill, flux_control, qwen_edit, qwen_edit_plus, wan_image_to_video, ltx_image_to_video)
}
PIPELINES = {f.__name__: f for f in (flux, flux2, sd3, sd3_without_t5, pixart, z_image, wan, hunyuan_video)}
