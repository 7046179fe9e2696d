"""What the examples share: their arguments, and the pipeline call that follows from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ppcl.errors import UserError


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all examples.

    Args:
        doc: The example's module docstring.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", help="RUN/pipeline of a ppcl run, or a hub id")
    made.add_argument("prompt")
    made.add_argument("--size", type=int, default=1024, help="pixels; the emoji model draws 48")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--guidance", type=float, default=3.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("picture.png"))
    return made


def exits_cleanly(main: Callable[[], None]) -> None:
    """Run an example; what a user can mend is one line and exit code 2, as in the command line of ppcl."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)


def device() -> str:
    """The accelerator, or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: str, **options: Any) -> Any:
    """Load a pipeline onto the device; bfloat16 on an accelerator."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    return DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options).to(device())


def draw(pipe: Any, given: argparse.Namespace, **more: Any) -> Any:
    """Draw one picture.

    Args:
        pipe: The pipeline.
        given: Parsed arguments of :func:`parser`.
        **more: Further arguments of the pipeline call.

    Returns:
        A PIL picture.
    """
    qwen = type(pipe).__name__.startswith("QwenImage")  # it guides by a second pass, FLUX by an embedding
    guidance = (
        {"negative_prompt": " ", "true_cfg_scale": given.guidance} if qwen else {"guidance_scale": given.guidance}
    )
    return pipe(
        given.prompt,
        height=given.size,
        width=given.size,
        num_inference_steps=given.steps,
        generator=torch.Generator().manual_seed(given.seed),
        **guidance,
        **more,
    ).images[0]
