"""Look at the embedded teacher: contact sheets of fixed captions, judged by the evaluator too.

    python -m ppcl.emoji.sheet --out docs/teacher

Draws 32 fixed captions of the training split, 32 pairs that were never seen together, and all
emoji that were never seen at all, beside the real pictures. Writes ``sheet-train.png``,
``sheet-new_pair.png``, ``sheet-new_emoji.png`` and ``sheet.json`` (the rank of each caption
among all captions of the data set, by the evaluator).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw

from ppcl.common.files import atomic_path, write_json
from ppcl.emoji.data import ASSETS, SIZE, Pair, load_emoji, load_pairs, load_pictures

COLUMNS = 8
CELL = 2 * SIZE + 8


def fixed_pairs(split: str, count: int = 32) -> list[Pair]:
    """Evenly spaced pairs of a split's first round: different emoji on changing grounds."""
    pairs = load_pairs(split)
    if split == "train":
        pairs = pairs[: len(load_emoji())]
    elif split == "new emoji":
        pairs = pairs[: len({pair.tile for pair in pairs})]
    return list(pairs[:: max(1, len(pairs) // count)][:count])


def draw(pipeline: Any, captions: list[str], guidance: float, steps: int) -> list[Image.Image]:
    """Draw captions, picture i from noise of seed i."""
    with torch.no_grad():
        output = pipeline(
            captions,
            negative_prompt=[" "] * len(captions),
            true_cfg_scale=guidance,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
        )
    images: list[Image.Image] = output.images
    return images


def ranks(pictures: list[Image.Image], wanted: list[Pair]) -> list[int]:
    """Rank of each picture's own caption among all captions, by the evaluator; 0 is best."""
    folder = f"local-dir:{ASSETS / 'evaluator'}"
    model, preprocess = open_clip.create_model_from_pretrained(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    pairs = load_pairs()
    with torch.no_grad():
        text = model.encode_text(tokenizer([pair.caption for pair in pairs]), normalize=True)
        image = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
    scores = image @ text.T
    own = scores[torch.arange(len(wanted)), torch.tensor([pairs.index(pair) for pair in wanted])]
    better: list[int] = (scores > own[:, None]).sum(1).tolist()
    return better


def sheet(drawn: list[Image.Image], real: np.ndarray, captions: list[str]) -> Image.Image:
    """Drawn pictures with the real ones beside them and the caption below."""
    rows = -(-len(drawn) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * CELL, rows * (SIZE + 18)), "white")
    pen = ImageDraw.Draw(page)
    for index, picture in enumerate(drawn):
        left, top = index % COLUMNS * CELL, index // COLUMNS * (SIZE + 18)
        page.paste(picture, (left, top))
        page.paste(Image.fromarray(real[index]), (left + SIZE, top))
        pen.text((left + 2, top + SIZE + 2), captions[index][:19], fill="black")
    return page.resize((page.width * 2, page.height * 2), Image.Resampling.LANCZOS)


def main() -> None:
    """Draw both lists and write the sheet."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "teacher"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(given.model)
    pipeline.set_progress_bar_config(disable=True)
    record: dict[str, Any] = {"guidance": given.guidance, "steps": given.steps, "captions_ranked": len(load_pairs())}
    for split in ("train", "new pair", "new emoji"):
        name, chosen = split.replace(" ", "_"), fixed_pairs(split)
        captions = [pair.caption for pair in chosen]
        drawn = draw(pipeline, captions, given.guidance, given.steps)
        found = ranks(drawn, chosen)
        record[name] = {
            "recognised_at_1": sum(r == 0 for r in found) / len(found),
            "recognised_at_5": sum(r < 5 for r in found) / len(found),
            "rank": dict(zip(captions, found, strict=True)),
        }
        with atomic_path(given.out / f"sheet-{name}.png") as temporary:
            sheet(drawn, load_pictures(chosen), captions).save(temporary, format="PNG")
        print(split, {key: value for key, value in record[name].items() if key != "rank"})
    write_json(given.out / "sheet.json", record)


if __name__ == "__main__":
    main()
