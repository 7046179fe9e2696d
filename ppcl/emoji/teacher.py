"""Train the embedded teacher: text encoder and transformer together, by flow matching.

    python -m ppcl.emoji.teacher --start ppcl/assets/teacher --out runs/emoji-teacher --minutes 110

Goes on from a teacher's weights, or from none (``--vae FOLDER``); under ``python -m torch.distributed.run`` several
processes share every batch. Pictures are drawn anew in
every step, each another variation of its caption's picture (``variation.py``). Writes an
ordinary QwenImagePipeline folder, ``OUT/pipeline``, with every checkpoint. Resumes when run
again; ``--minutes`` ends this call, not the training. ``--steps`` may be changed on the way:
the learning rate follows the fraction that is done, so a smaller number brings a running
training to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppcl.common.files import append_row, atomic_path
from ppcl.common.folders import lock_folder
from ppcl.common.streams import Stream, step_generator
from ppcl.emoji.components import (
    assemble,
    encode_pictures,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    pack,
)
from ppcl.emoji.data import SIZE, Pair, load_pairs
from ppcl.emoji.vae import single_frame_forward
from ppcl.emoji.variation import Sprites, Variation
from ppcl.training import stopping
from ppcl.training.distributed import SINGLE, Group, connect
from ppcl.training.launch import silence_others
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings

NULL_PROMPT = " "  # what the pipelines use as the negative prompt
DROPOUT = 0.1
SAVE_SECONDS = 240
EVERY = slice(None)
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


class Batches:
    """What a step is trained on: captions, and one variation of each picture as latents."""

    def __init__(self, pipeline: QwenImagePipeline, pairs: Sequence[Pair], device: str) -> None:
        self.prompts = Captions(pipeline, [pair.caption for pair in pairs])
        self.sprites, self.device = Sprites(pairs), device
        self.vae = copy.deepcopy(pipeline.vae).requires_grad_(False)
        for conv in self.vae.modules():
            if isinstance(conv, QwenImageCausalConv3d):
                conv.forward = partial(single_frame_forward, conv)

    def draw(self, size: int, generator: torch.Generator, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids and mask, both (B, tokens), and clean latents, (B, places, 16), of B of ``size`` samples."""
        indices = torch.randint(len(self.sprites.tile), (size,), generator=generator)[part]
        dropped = torch.rand(size, generator=generator)[part] < DROPOUT
        pictures = self.sprites.draw(indices, Variation.draw(size, generator)[part])
        latents = pack(encode_pictures(self.vae, pictures.unsqueeze(2)))
        ids, mask = self.prompts.batch(indices, dropped)
        return ids.to(self.device), mask.to(self.device), latents.to(self.device)


def velocity_loss(
    pipeline: QwenImagePipeline, batches: Batches, size: int, generator: torch.Generator, part: slice = EVERY
) -> Tensor:
    """Mean squared error of the velocity at one noise level a sample, levels logit-normal.

    Args:
        pipeline: The teacher.
        batches: Where the samples come from.
        size: Samples of a step.
        generator: Source of all randomness of the step.
        part: Which of the samples are looked at.

    Returns:
        Scalar.
    """
    ids, mask, clean = batches.draw(size, generator, part)
    sigma = torch.randn(size, generator=generator)[part].sigmoid().to(clean.device)
    noise = torch.randn((size, *clean.shape[1:]), generator=generator)[part].to(clean.device)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    prefix, device = batches.prompts.prefix, clean.device.type
    # On a CPU, plain attention is a tenth faster than the fused kernel for sequences as short as these.
    attention = [SDPBackend.MATH] if device == "cpu" else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(attention):
        hidden = pipeline.text_encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, prefix:]
        velocity = pipeline.transformer(
            hidden_states=noisy,
            encoder_hidden_states=hidden,
            encoder_hidden_states_mask=mask[:, prefix:].bool(),
            timestep=sigma,
            img_shapes=[[(1, SIZE // 8, SIZE // 8)]] * len(clean),
            return_dict=False,
        )[0]
    return F.mse_loss(velocity.float(), noise - clean)


@torch.no_grad()
def publish(pipeline: QwenImagePipeline, loop: TrainingLoop, folder: Path) -> None:
    """Write the pipeline with the moving average of the weights; the training goes on with its own."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)).cpu() for name in ("text_encoder", "transformer")}
    weights = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
    for key, average in loop.ema.items():
        weights[key].copy_(average)
    # transformers loads a checkpoint in its own dtype, diffusers in float32: stored in float16, the text
    # encoder would not fit the rest when somebody loads the folder without naming a dtype
    parts["transformer"].half()
    vae = copy.deepcopy(pipeline.vae).half()
    for part in (vae, parts["transformer"]):
        part.register_to_config(_name_or_path="emoji")  # not the folder it happened to be loaded from
    with atomic_path(folder) as temporary:
        assemble(vae, pipeline.tokenizer, **parts).save_pretrained(temporary)


def train(
    pipeline: QwenImagePipeline,
    out: Path,
    settings: LoopSettings,
    minutes: float = float("inf"),
    device: str = "cpu",
    compiled: bool = True,
    group: Group = SINGLE,
) -> bool:
    """Train a pipeline's text encoder and transformer, resuming what ``out`` holds.

    Args:
        pipeline: Whose parts are trained, in place, from the weights that they have.
        out: Gets ``pipeline``, ``log.jsonl`` and ``checkpoints``.
        settings: Of the loop; ``batch_size`` too.
        minutes: After so many the state is saved and the call ends.
        device: Where it is trained.
        compiled: Whether the blocks are compiled.
        group: The processes that train, each on its part of every batch.

    Returns:
        Whether all steps are done.
    """
    lock = lock_folder(out) if group.is_main else None
    text_encoder, transformer = pipeline.text_encoder.to(device).train(), pipeline.transformer.to(device).train()
    text_encoder.model.visual.requires_grad_(False)
    transformer.transformer_blocks[-1].txt_mlp.requires_grad_(False)  # its text half cannot reach the output
    batches = Batches(pipeline, load_pairs("train"), device)
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    modules = {"text_encoder": text_encoder, "transformer": transformer}
    fingerprint = f"teacher-{settings.batch_size}-{settings.seed}"
    loop = TrainingLoop(modules, settings, out / "checkpoints", fingerprint, label="teacher", group=group)
    part = slice(group.rank, None, group.size)
    share = len(range(settings.batch_size)[part]) / settings.batch_size
    end, saved = time.monotonic() + 60 * minutes, time.monotonic()
    try:
        for step in loop:
            generator = step_generator(settings.seed, step, Stream.EMOJI_BATCH)
            loss = share * velocity_loss(pipeline, batches, settings.batch_size, generator, part)
            loss.backward()  # type: ignore[no-untyped-call]
            loop.add({"loss": loss.item()})
            row, late = loop.step(), group.any(time.monotonic() > end)
            if step % 20 == 0 and group.is_main:
                append_row(out / "log.jsonl", row)
            if late or group.any(time.monotonic() > saved + SAVE_SECONDS):
                loop.save(step + 1)
                group.on_main(lambda: publish(pipeline, loop, out / "pipeline"))
                saved = time.monotonic()
            if late and step + 1 < settings.steps:
                return False
        group.on_main(lambda: publish(pipeline, loop, out / "pipeline"))
    finally:
        if lock is not None:
            lock.release()
    return True


def loop_settings(steps: int, batch_size: int, learning_rate: float) -> LoopSettings:
    """What the teacher is trained with: Muon for the matrices at five times AdamW's rate for the rest."""
    return LoopSettings(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=100,
        ema_decay=0.998,
        final_fraction=0.01,
        weight_decay=0.01,
        checkpoint_every=steps,  # and by the clock, see train
        batch_size=batch_size,
        muon_learning_rate=5 * learning_rate,
    )


def new_pipeline(vae: AutoencoderKLQwenImage, seed: int = 0) -> QwenImagePipeline:
    """An untrained teacher around a trained VAE."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer([pair.caption for pair in load_pairs("train")])
    return assemble(vae, tokenizer, new_text_encoder(tokenizer), new_transformer())


def main() -> None:
    """Train from the command line; SIGTERM saves and ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--start", type=Path, help="pipeline folder whose weights are trained further")
    begin.add_argument("--vae", type=Path, help="VAE folder: text encoder and transformer start from nothing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="save and end this call after so many")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.start:
        pipeline = QwenImagePipeline.from_pretrained(given.start)
    else:
        pipeline = new_pipeline(AutoencoderKLQwenImage.from_pretrained(given.vae))
    settings, group = loop_settings(given.steps, given.batch_size, given.learning_rate), connect(given.device == "cpu")
    silence_others()
    with contextlib.suppress(stopping.Stopped), stopping.on_signals():
        device = str(group.place(torch.device(given.device)))
        done = train(pipeline, given.out, settings, given.minutes, device, group=group)
        print("all steps are done" if done else "time is up; run the same command again to go on")
    group.close()


if __name__ == "__main__":
    main()
