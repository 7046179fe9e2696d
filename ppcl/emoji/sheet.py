"""Look at the embedded teacher: contact sheets of fixed captions, judged by the evaluator too.

    python -m ppcl.emoji.sheet --out docs/teacher

Draws 32 fixed captions of the training split, 32 pairs that were never seen together, and all
emoji that were never seen at all, each from several seeds, with the plain real picture beside
them. Writes ``sheet-train.png``, ``sheet-new_pair.png``, ``sheet-new_emoji.png`` and
``sheet.json``: the rank of each picture's caption among all captions of the data set, by the
evaluator, and how much the seeds of a caption differ, beside as many variations of the real
picture: their PSNR (the lower, the more) and their diversity (1 - SSIM; the higher, the more).
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw
from torchmetrics.functional.image import structural_similarity_index_measure

from ppcl.common.files import atomic_path, write_json
from ppcl.emoji.data import ASSETS, SIZE, Pair, load_emoji, load_pairs, load_pictures
from ppcl.emoji.variation import load_varied_pictures


def fixed_pairs(split: str, count: int = 32) -> list[Pair]:
    """Evenly spaced pairs of a split's first round: different emoji on changing grounds."""
    pairs = load_pairs(split)
    if split == "train":
        pairs = pairs[: len(load_emoji())]
    elif split == "new emoji":
        pairs = pairs[: len({pair.tile for pair in pairs})]
    return list(pairs[:: max(1, len(pairs) // count)][:count])


def draw(pipeline: Any, captions: list[str], guidance: float, steps: int, seeds: int) -> np.ndarray:
    """Draw captions, each from seeds of its own.

    Returns:
        (captions, seeds, SIZE, SIZE, 3) uint8.
    """
    prompts = [caption for caption in captions for _ in range(seeds)]
    with torch.no_grad():
        images = pipeline(
            prompts,
            negative_prompt=[" "] * len(prompts),
            true_cfg_scale=guidance,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        ).images
    return np.stack([np.asarray(image) for image in images]).reshape(len(captions), seeds, SIZE, SIZE, 3)


def ranks(pictures: np.ndarray, wanted: list[Pair], evaluator: Path) -> np.ndarray:
    """Rank of each picture's own caption among all captions, by the evaluator; (captions, seeds), 0 is best."""
    folder = f"local-dir:{evaluator}"
    model, preprocess = open_clip.create_model_from_pretrained(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    pairs = load_pairs()
    images = torch.stack([preprocess(Image.fromarray(p)) for p in pictures.reshape(-1, SIZE, SIZE, 3)])
    with torch.no_grad():
        text = model.encode_text(tokenizer([pair.caption for pair in pairs]), normalize=True)
        scores = model.encode_image(images, normalize=True) @ text.T
    own = torch.tensor([pairs.index(pair) for pair in wanted]).repeat_interleave(pictures.shape[1])
    better = (scores > scores.gather(1, own[:, None])).sum(1)
    rank: np.ndarray = better.view(pictures.shape[:2]).numpy()
    return rank


def between_seeds(pictures: np.ndarray) -> dict[str, float]:
    """How alike pictures of a caption are.

    Args:
        pictures: (captions, seeds, H, W, 3) uint8, two seeds at least.

    Returns:
        ``psnr_db`` and ``diversity`` (1 - SSIM), means over captions and pairs of seeds.
    """
    of_seeds = torch.from_numpy(pictures).permute(1, 0, 4, 2, 3).double() / 255
    decibels, differences = [], []
    for one, two in combinations(of_seeds, 2):
        error = (one - two).square().mean((1, 2, 3)).clamp(min=1e-8)
        decibels.append(float((-10 * error.log10()).mean()))
        differences.append(1 - float(structural_similarity_index_measure(one, two, data_range=1.0)))  # type: ignore[arg-type]
    return {"psnr_db": round(float(np.mean(decibels)), 2), "diversity": round(float(np.mean(differences)), 3)}


def sheet(drawn: np.ndarray, real: np.ndarray, captions: list[str]) -> Image.Image:
    """The drawn pictures of a caption with the real one after them and the caption below."""
    seeds = drawn.shape[1]
    cell, columns = (seeds + 1) * SIZE + 8, max(1, 16 // (seeds + 1))
    page = Image.new("RGB", (columns * cell, -(-len(drawn) // columns) * (SIZE + 18)), "white")
    pen = ImageDraw.Draw(page)
    for index, pictures in enumerate(drawn):
        left, top = index % columns * cell, index // columns * (SIZE + 18)
        for place, picture in enumerate([*pictures, real[index]]):
            page.paste(Image.fromarray(picture), (left + place * SIZE, top))
        pen.text((left + 2, top + SIZE + 2), captions[index][: cell // 6], fill="black")
    return page.resize((page.width * 2, page.height * 2), Image.Resampling.LANCZOS)


def main() -> None:
    """Draw the captions of each split and write the sheets."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "teacher"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4, help="pictures of a caption")
    parser.add_argument("--captions", type=int, default=32, help="of a split")
    parser.add_argument("--splits", nargs="+", default=["train", "new pair", "new emoji"])
    parser.add_argument("--evaluator", type=Path, default=ASSETS / "evaluator")
    given = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(given.model)
    pipeline.set_progress_bar_config(disable=True)
    record: dict[str, Any] = {"guidance": given.guidance, "steps": given.steps, "seeds": given.seeds}
    record["captions_ranked"] = len(load_pairs())
    for split in given.splits:
        name, pairs = split.replace(" ", "_"), fixed_pairs(split, given.captions)
        captions = [pair.caption for pair in pairs]
        drawn = draw(pipeline, captions, given.guidance, given.steps, given.seeds)
        ranks_of_captions = ranks(drawn, pairs, given.evaluator)
        record[name] = {
            "recognised_at_1": float((ranks_of_captions == 0).mean()),
            "recognised_at_5": float((ranks_of_captions < 5).mean()),
            "rank": dict(zip(captions, ranks_of_captions.tolist(), strict=True)),
        }
        if given.seeds > 1:
            real = np.stack([load_varied_pictures(pairs, seed) for seed in range(given.seeds)], 1)
            record[name]["between_seeds"] = between_seeds(drawn)
            record[name]["between_real_variations"] = between_seeds(real)
        with atomic_path(given.out / f"sheet-{name}.png") as temporary:
            sheet(drawn, load_pictures(pairs), captions).save(temporary, format="PNG")
        print(split, {key: value for key, value in record[name].items() if key != "rank"})
    write_json(given.out / "sheet.json", record)


if __name__ == "__main__":
    main()
