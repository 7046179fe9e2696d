"""Draw with a compressed pipeline: plain diffusers.

python pipelines/text_to_image.py runs/demo/pipeline "grinning cat" --size 48 --out cat.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def main() -> None:
    """Load the folder, draw one picture, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="RUN/pipeline of a ppcl run, or a hub id")
    parser.add_argument("prompt")
    parser.add_argument("--size", type=int, default=1024, help="pixels; the emoji model draws 48")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(given.folder).to(device)
    qwen = type(pipe).__name__.startswith("QwenImage")  # the others have one name for guidance of either kind
    guidance = (
        {"negative_prompt": " ", "true_cfg_scale": given.guidance} if qwen else {"guidance_scale": given.guidance}
    )
    picture = pipe(
        given.prompt,
        height=given.size,
        width=given.size,
        num_inference_steps=given.steps,
        generator=torch.Generator().manual_seed(given.seed),
        **guidance,
    ).images[0]
    picture.save(given.out)


if __name__ == "__main__":
    main()
