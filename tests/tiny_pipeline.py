"""A tiny pipeline, built offline in a second, and the settings of a run on it."""

import torch

PROMPTS = [f"{adjective} {noun}" for adjective in ("red", "blue", "old", "tiny") for noun in ("cat", "house", "boat")]
SMALL = {
    "capture": {
        "num_prompts": 8,
        "batch_size": 4,
        "num_inference_steps": 3,
        "states_per_prompt": 2,
        "held_out_share": 0.25,
        "height": 16,
        "width": 16,
        "guidance_scale": 2.0,
    },
    "analyze": {"cka_tokens": 64, "batch_size": 8},
    "fit": {"max_run": 3, "max_candidates": 4, "steps": 3, "batch_size": 4, "eval_states": 4, "width": []},
    "plan": {"keep": 0.8},
    "distill": {"local_steps": 4, "output_steps": 3, "batch_size": 4, "checkpoint_every": 1},
    "evaluate": {
        "num_prompts": 4,
        "num_inference_steps": 2,
        "batch_size": 2,
        "velocity_states": 4,
        "latency_runs": 1,
        "features": "emoji",
    },
}


def tiny_qwen_pipeline(num_layers: int = 6, seed: int = 0):
    """A random QwenImagePipeline of width 32 that draws 16 px pictures (4 image tokens)."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    from ppcl.emoji.components import assemble, new_text_encoder, new_tokenizer

    torch.manual_seed(seed)
    tokenizer = new_tokenizer(PROMPTS)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        axes_dims_rope=(4, 6, 6),
    )
    return assemble(vae, tokenizer, new_text_encoder(tokenizer), transformer)
