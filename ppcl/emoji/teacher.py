"""Train the embedded teacher: text encoder and transformer together, by flow matching.

    python -m ppcl.emoji.teacher --vae runs/emoji-vae/vae --out runs/emoji-teacher

Writes an ordinary QwenImagePipeline folder. Resumes when run again. ``--steps`` may be
changed on the way: the learning rate follows the fraction that is done, so a smaller
number brings a running training to its end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppcl.common.files import atomic_path
from ppcl.common.streams import step_generator
from ppcl.emoji.components import (
    assemble,
    encode_pictures,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    pack,
)
from ppcl.emoji.data import SIZE, load_pairs, load_pictures
from ppcl.emoji.vae import to_tensor
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings

NULL_PROMPT = " "  # what the pipelines use as the negative prompt
DROPOUT = 0.1
TEXT_TOKENS = 12  # after the template's prefix: room for every caption, and one shape to compile


class Captions:
    """Tokenised prompts, template included, padded to one length; the empty prompt comes last."""

    def __init__(self, pipeline: QwenImagePipeline, captions: list[str]) -> None:
        self.prefix = pipeline.prompt_template_encode_start_idx
        texts = [pipeline.prompt_template_encode.format(caption) for caption in [*captions, NULL_PROMPT]]
        tokens = [pipeline.tokenizer(text).input_ids for text in texts]
        prefix = pipeline.prompt_template_encode.split("{}")[0]
        if len(pipeline.tokenizer(prefix).input_ids) != self.prefix:
            raise AssertionError("the tokenizer must turn the template's prefix into 34 tokens")
        longest = max(map(len, tokens)) - self.prefix
        if longest > TEXT_TOKENS:
            raise AssertionError(f"a caption has {longest} tokens, more than {TEXT_TOKENS}")
        self.ids = torch.full((len(tokens), self.prefix + TEXT_TOKENS), pipeline.tokenizer.pad_token_id)
        self.mask = torch.zeros_like(self.ids)
        for row, ids in enumerate(tokens):
            self.ids[row, : len(ids)] = torch.tensor(ids)
            self.mask[row, : len(ids)] = 1

    def batch(self, indices: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, both (B, prefix + TEXT_TOKENS)."""
        rows = torch.where(dropped, len(self.ids) - 1, indices)
        return self.ids[rows], self.mask[rows]


def train(
    vae_path: Path,
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    device: str,
    seed: int = 0,
) -> None:
    """Train and write ``out/pipeline``; the training log goes to ``out/log.jsonl``."""
    pairs = load_pairs("train")
    captions = [pair.caption for pair in pairs]
    vae = AutoencoderKLQwenImage.from_pretrained(vae_path)
    latents = pack(encode_pictures(vae, to_tensor(load_pictures(pairs)))).to(device)
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(captions)
    text_encoder, transformer = new_text_encoder(tokenizer).to(device), new_transformer().to(device)
    text_encoder.model.visual.requires_grad_(False)
    # The last block's text half cannot reach the output.
    transformer.transformer_blocks[-1].txt_mlp.requires_grad_(False)
    pipeline = assemble(vae, tokenizer, text_encoder, transformer)
    prompts = Captions(pipeline, captions)
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    grid = SIZE // 8
    # On a CPU, plain attention is a tenth faster than the fused kernel for sequences as short as these.
    attention = [SDPBackend.MATH] if device == "cpu" else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def backward(step: int) -> dict[str, float]:
        generator = step_generator(seed, step)
        indices = torch.randint(len(captions), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < DROPOUT
        ids, mask = (t.to(device) for t in prompts.batch(indices, dropped))
        sigma = torch.randn(batch_size, generator=generator).sigmoid().to(device)
        clean = latents[indices.to(device)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
        with torch.autocast(torch.device(device).type, torch.bfloat16), sdpa_kernel(attention):
            hidden = text_encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, prompts.prefix :]
            velocity = transformer(
                hidden_states=noisy,
                encoder_hidden_states=hidden,
                encoder_hidden_states_mask=mask[:, prompts.prefix :].bool(),
                timestep=sigma,
                img_shapes=[[(1, grid, grid)]] * batch_size,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.item()}

    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("a") as log_file:

        def log(row: dict[str, Any]) -> None:
            if row["step"] % 20 == 0:
                print(json.dumps(row), file=log_file, flush=True)

        settings = LoopSettings(
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=100,
            ema_decay=0.998,
            final_fraction=0.01,
            weight_decay=0.01,
            checkpoint_every=250,
            seed=seed,
            muon_learning_rate=5 * learning_rate,
        )
        modules = {"text_encoder": text_encoder, "transformer": transformer}
        fingerprint = f"teacher-{batch_size}-{seed}"
        loop = TrainingLoop(modules, backward, settings, out / "checkpoints", fingerprint, log, "teacher")
        loop.run()
        loop.load_ema()
    with atomic_path(out / "pipeline") as temporary:
        pipeline.to("cpu")
        # transformers loads a checkpoint in its own dtype, diffusers in float32: stored in float16, the text
        # encoder would not fit the rest when somebody loads the folder without naming a dtype
        pipeline.transformer.half()
        pipeline.vae.half()
        vae.register_to_config(_name_or_path="emoji")  # not the folder it happened to be loaded from
        pipeline.save_pretrained(temporary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    train(given.vae, given.out, given.steps, given.batch_size, given.learning_rate, given.device)
