"""Train the embedded evaluator: a small open_clip model on the captioned emoji.

    python -m ppcl.emoji.evaluator --out ppcl/assets/evaluator

It judges the embedded teacher offline: CLIP score, caption retrieval, Frechet features.
It knows emoji and nothing else. Pictures vary while training as the teacher's do and a little
more, and are blurred and recoloured, so that a caption is told whatever size and place and
drawings that are a little off are accepted, as by a person. ``--start FOLDER`` trains an
evaluator further.
Loads with ``open_clip.create_model_from_pretrained("local-dir:FOLDER")``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl.common.files import atomic_path, write_json
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.emoji.data import SIZE, load_pairs, load_pictures
from ppcl.emoji.variation import Sprites, Variation, load_varied_pictures
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings

CONTEXT = 16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 2048
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 128,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "tokenizer",
    },
}
PREPROCESS: dict[str, Any] = {
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def save_tokenizer(captions: list[str], folder: Path) -> None:
    """Train a lower-case BPE and save it; the end token has the highest id, where open_clip pools."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, special_tokens=["<pad>", "<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator(captions, trainer)
    raw.add_special_tokens(["<end>"])
    end = raw.token_to_id("<end>")
    raw.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=CONTEXT
    ).save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer that lies in a folder; of one that is trained again the rare tokens are in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)


def augment(sprites: Sprites, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Draw pairs in other places and sizes each, recolour, blur and soil the pictures.

    Args:
        sprites: What can be drawn.
        indices: (B,) places of the pairs.
        generator: Source of all randomness.

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    batch = len(indices)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    drawn = Variation.draw(batch, generator)
    wider = replace(drawn, scale=drawn.scale * uniform(0.93, 1.07), turn=1.5 * drawn.turn)
    moved = (sprites.draw(indices, wider) + 1) * uniform(0.85, 1.1, 3, 1, 1) - 1
    small = F.interpolate(moved, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, size=moved.shape[-2:], mode="bilinear", align_corners=False)
    moved = torch.lerp(moved, blurred, uniform(0, 1, 1, 1, 1))
    soil = torch.randn(moved.shape, generator=generator) * uniform(0, 0.15, 1, 1, 1)
    return (moved + soil).clamp(-1, 1)


def retrieval_at_1(model: torch.nn.Module, pictures: Tensor, tokens: Tensor) -> float:
    """Share of pictures whose nearest caption among all given is their own."""
    with torch.no_grad():
        image = torch.cat([model.encode_image(part, normalize=True) for part in torch.split(pictures, 128)])  # type: ignore[operator]
        text = model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    return float((image @ text.T).argmax(1).eq(torch.arange(len(pictures))).float().mean())


def train(out: Path, work: Path, steps: int, start: Path | None = None, batch_size: int = 192, seed: int = 0) -> None:
    """Train the evaluator, on from ``start`` if given, and write it, with its own check, to ``out``."""
    pairs = {split: load_pairs(split) for split in ("train", "new pair", "new emoji")}
    train_pairs = pairs["train"]
    sprites = Sprites(train_pairs)
    captions = [pair.caption for pair in train_pairs]
    if not (work / "tokenizer" / TOKENIZER_FILES[0]).is_file():  # training one anew gives other ids
        if start:
            copy_tokenizer(start, work / "tokenizer")
        else:
            save_tokenizer(captions, work / "tokenizer")
    tokenize = open_clip.tokenizer.HFTokenizer(str(work / "tokenizer"), context_length=CONTEXT)
    tokens = tokenize(captions)
    torch.manual_seed(seed)
    arguments = {k: v for k, v in MODEL["text_cfg"].items() if k != "hf_tokenizer_name"}
    model = open_clip.CLIP(MODEL["embed_dim"], MODEL["vision_cfg"], arguments)
    if start:
        model.load_state_dict(read_tensors(start / "open_clip_model.safetensors")[0])

    rate = 5e-4 if start else 1e-3
    settings = LoopSettings(steps, rate, warmup_steps=50, weight_decay=0.1, betas=(0.9, 0.98), ema_decay=0.99)
    loop = TrainingLoop({"clip": model}, settings, work / "checkpoints", f"evaluator-{steps}", label="evaluator")
    for step in loop:
        generator = step_generator(seed, step, Stream.EMOJI_BATCH)
        picked = torch.randperm(len(train_pairs), generator=generator)[:batch_size]
        batch = augment(sprites, picked, generator)
        with torch.autocast("cpu", torch.bfloat16):
            image, text, scale = model(batch, tokens[picked])
        logits = scale.float().clamp(max=50) * image.float() @ text.float().T
        target = torch.arange(batch_size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        loop.add({"loss": loss.item()})
        loop.step()
    loop.load_ema()
    model.eval()
    check: dict[str, float] = {"steps": steps}
    for split, members in pairs.items():
        pictures, varied = (
            torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            for images in (load_pictures(members), load_varied_pictures(members, seed))
        )
        texts = tokenize([pair.caption for pair in members])
        name = split.replace(" ", "_")
        check[f"{name}_retrieval_at_1"] = retrieval_at_1(model, pictures, texts)
        check[f"{name}_varied_retrieval_at_1"] = retrieval_at_1(model, varied, texts)
        check[f"{name}_chance"] = 1 / len(members)
        if split == "train":
            order = torch.randperm(len(texts), generator=step_generator(seed, 0, Stream.EMOJI_SHUFFLE))
            check["shuffled_retrieval_at_1"] = retrieval_at_1(model, pictures, texts[order])
    print(json.dumps(check))
    with atomic_path(out) as temporary:
        temporary.mkdir()
        write_json(temporary / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
        state = {
            name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        write_tensors(temporary / "open_clip_model.safetensors", state)
        copy_tokenizer(work / "tokenizer", temporary)
        write_json(temporary / "check.json", {name: round(value, 4) for name, value in check.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-evaluator"))
    parser.add_argument("--start", type=Path, help="evaluator folder whose weights are trained further")
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    train(given.out, given.work, given.steps, given.start)
