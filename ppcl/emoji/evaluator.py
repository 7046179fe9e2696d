"""Train the embedded evaluator: a small open_clip model on the captioned emoji.

    python -m ppcl.emoji.evaluator --out ppcl/assets/evaluator

It judges the embedded teacher offline: CLIP score, caption retrieval, Frechet features.
It knows emoji and nothing else. Pictures are shifted, scaled, blurred and recoloured while
training, so that it accepts drawings that are a little off, as a person would.
Loads with ``open_clip.create_model_from_pretrained("local-dir:FOLDER")``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl.emoji.data import SIZE, load_captions, load_images
from ppcl.files import atomic_path, write_json, write_tensors
from ppcl.training import LoopSettings, TrainingLoop, step_generator

CONTEXT = 16
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


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, recolour, blur and soil pictures (B, 3, H, W) in [-1, 1]."""
    batch = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    theta = torch.zeros(batch, 2, 3)
    angle, scale = uniform(-0.12, 0.12), uniform(0.9, 1.15)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos(), -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    theta[:, :, 2] = uniform(-0.1, 0.1, 2)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures - 1, grid, align_corners=False) + 1  # white outside
    moved = (moved - 1) * uniform(0.8, 1.1, 3, 1, 1) + 1
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


def train(out: Path, work: Path, steps: int, batch_size: int = 192, seed: int = 0) -> None:
    """Train the evaluator and write it, with its own check, to ``out``."""
    rows = load_captions()
    pictures = torch.from_numpy(load_images()).permute(0, 3, 1, 2).float() / 127.5 - 1
    chosen = torch.tensor([i for i, row in enumerate(rows) if row.split == "train"])
    unseen = torch.tensor([i for i, row in enumerate(rows) if row.split == "held-out"])
    captions = [row.caption for row in rows]
    save_tokenizer([captions[i] for i in chosen], work / "tokenizer")
    tokens = open_clip.tokenizer.HFTokenizer(str(work / "tokenizer"), context_length=CONTEXT)(captions)
    torch.manual_seed(seed)
    arguments = {k: v for k, v in MODEL["text_cfg"].items() if k != "hf_tokenizer_name"}
    model = open_clip.CLIP(MODEL["embed_dim"], MODEL["vision_cfg"], arguments)

    def backward(step: int) -> dict[str, float]:
        generator = step_generator(seed, step)
        picked = chosen[torch.randperm(len(chosen), generator=generator)[:batch_size]]
        batch = augment(pictures[picked], generator)
        with torch.autocast("cpu", torch.bfloat16):
            image, text, scale = model(batch, tokens[picked])
        logits = scale.float().clamp(max=50) * image.float() @ text.float().T
        target = torch.arange(batch_size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.item()}

    settings = LoopSettings(steps, 1e-3, warmup_steps=50, weight_decay=0.1, betas=(0.9, 0.98), ema_decay=0.99)
    loop = TrainingLoop(
        {"clip": model}, backward, settings, work / "checkpoints", f"evaluator-{steps}", label="evaluator"
    )
    loop.run()
    loop.load_ema()
    model.eval()
    shuffled = tokens[chosen[torch.randperm(len(chosen), generator=step_generator(seed, 0))]]
    check = {
        "steps": steps,
        "train_retrieval_at_1": retrieval_at_1(model, pictures[chosen], tokens[chosen]),
        "shuffled_retrieval_at_1": retrieval_at_1(model, pictures[chosen], shuffled),
        "held_out_retrieval_at_1_of_91": retrieval_at_1(model, pictures[unseen], tokens[unseen]),
        "chance_train": 1 / len(chosen),
    }
    print(json.dumps(check))
    with atomic_path(out) as temporary:
        temporary.mkdir()
        write_json(temporary / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
        state = {
            name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        write_tensors(temporary / "open_clip_model.safetensors", state)
        save_tokenizer([captions[i] for i in chosen], temporary)
        write_json(temporary / "check.json", {k: round(v, 4) if not math.isnan(v) else None for k, v in check.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/emoji-evaluator"))
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    train(given.out, given.work, given.steps)
