"""Train the embedded VAE: a small AutoencoderKLQwenImage (f4, four channels) on the emoji.

    python -m ppcl.emoji.vae --out runs/emoji-vae

About ten minutes on two cores, on pictures that vary as the teacher's do. The decoder sees
latents with a little noise, so that it forgives the small errors of a diffusion model.
``--start FOLDER`` trains the decoder of a VAE further: latents stay what they are, so a
teacher that was trained on them keeps its worth.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor

from ppcl.common.files import atomic_path
from ppcl.common.streams import Stream, step_generator
from ppcl.emoji.data import load_pairs
from ppcl.emoji.variation import Sprites, Variation, load_varied_pictures
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings

CHANNELS = 4


def new_vae() -> AutoencoderKLQwenImage:
    """The untrained VAE: 4x smaller latents, four channels, about 1M parameters."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def single_frame_forward(conv: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The causal 3D convolution of one frame as a 2D one: the frames before it are zeros (2x faster training)."""
    if x.shape[2] != 1 or cache_x is not None:
        raise AssertionError("the VAE is trained on single pictures")
    frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)
    kernel = conv.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(frame, kernel, conv.bias, stride=conv.stride[1:], padding=padding).unsqueeze(2)


def to_tensor(images: np.ndarray) -> Tensor:
    """Map (N, H, W, 3) uint8 to (N, 3, 1, H, W) in [-1, 1], the VAE's video layout."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE, plus L1 of finite differences, which keeps outlines sharp."""
    loss = F.l1_loss(output, target) + F.mse_loss(output, target)
    for dim in (-1, -2):
        loss = loss + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def train(out: Path, steps: int, start: Path | None = None, batch_size: int = 32, seed: int = 0) -> float:
    """Train the VAE, or the decoder of ``start``; return the PSNR on varied pictures of new emoji in dB.

    A new VAE gets the statistics of its latents.
    """
    pairs = load_pairs("train")
    sprites, unseen = Sprites(pairs), to_tensor(load_varied_pictures(load_pairs("new emoji"), seed))
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage.from_pretrained(start) if start else new_vae()
    if start:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    for conv in vae.modules():
        if isinstance(conv, QwenImageCausalConv3d):
            conv.forward = partial(single_frame_forward, conv)

    rate = 1e-3 if start else 3e-3
    settings = LoopSettings(steps=steps, learning_rate=rate, warmup_steps=50, ema_decay=0.995, final_fraction=0.02)
    loop = TrainingLoop({"vae": vae}, settings, out / "checkpoints", f"vae-{steps}-{batch_size}", label="vae")
    for step in loop:
        generator = step_generator(seed, step, Stream.EMOJI_BATCH)
        indices = torch.randint(len(pairs), (batch_size,), generator=generator)
        batch = sprites.draw(indices, Variation.draw(batch_size, generator)).unsqueeze(2)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(batch).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator)
            output = vae.decode(latents + 0.05 * noise, return_dict=False)[0]
        scale = latents.float().pow(2).mean()
        loss = reconstruction_loss(output.float(), batch) + 0.01 * (scale - 1).relu()
        loss.backward()  # type: ignore[no-untyped-call]
        loop.add({"loss": loss.item(), "latent_scale": scale.item()})
        loop.step()
    loop.load_ema()
    vae.eval()
    if not start:
        pictures = to_tensor(load_varied_pictures(pairs, seed))
        with torch.no_grad():
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(pictures, 64)])
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    with torch.no_grad():
        restored = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in torch.split(unseen, 64)])
    with atomic_path(out / "vae") as temporary:
        vae.save_pretrained(temporary)
    psnr = 10 * torch.log10(4 / F.mse_loss(restored.clamp(-1, 1), unseen)).item()
    statistics = {name: list(vae.config[name]) for name in ("latents_mean", "latents_std")}
    print(json.dumps({"new_emoji_psnr_db": psnr, **statistics}))
    return psnr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-vae"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--start", type=Path, help="VAE folder whose decoder is trained further")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.start)
