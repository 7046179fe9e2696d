"""A metrics.json made by hand, and pictures of noise beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl.common.files import write_json
from ppcl.eval.generate import read_picture

SIDE = 24
HOSTILE = "<script>alert(1)</script>"


def load_images(paths: Sequence[Path]) -> Tensor:
    """Picture files of one size, (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([read_picture(path) for path in paths])).permute(0, 3, 1, 2)


def number(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """A number as metrics.json holds it."""
    return {"value": value, "low": low, "high": high, "count": 40, "over": "pictures"}


def step(low: float, high: float, error: float) -> dict[str, Any]:
    """A row of the velocity error by timestep."""
    limits = {"low": 0.9 * error, "high": 1.2 * error}
    return {"timestep_low": low, "timestep_high": high, "states": 4, "error": error, **limits}


def speed(latency: float, steps: int | None = 20, **changes: Any) -> dict[str, Any]:
    """A row of times."""
    part = "picture" if steps else "transformer"
    times = {"latency_ms": latency, "latency_p10_ms": latency - 1, "latency_p90_ms": latency + 1, "runs": 3}
    rest = {"warmup_runs": 1, "batch_size": 4, "peak_memory_bytes": 50_000_000}
    return {"part": part, "num_inference_steps": steps, **times, **rest, **changes}


def model(label: str, numbers: dict[str, Any], params: int = 4_000_000, **changes: Any) -> dict[str, Any]:
    """A model as metrics.json holds it."""
    costs = {"latency_ms": 20.0, "latency_end_to_end_ms": None, "peak_memory_bytes": None}
    return {"label": label, "model": "a b", "params": params, "numbers": numbers, "costs": costs, **changes}


def comparison(label: str, against: str, fidelity: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A comparison as metrics.json holds it."""
    empty: dict[str, Any] = {"average_drop": None, "average_drop_per_score": {}, "differences": {}}
    rest = {"velocity_error_by_timestep": [], "param_ratio": 0.5, "speedup": 1.2, "speedup_end_to_end": 1.1}
    return {"label": label, "against": against, **empty, "fidelity": fidelity, **rest, "verdict": "", **changes}


def evaluation(models: list[dict[str, Any]], comparisons: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The content of metrics.json."""
    about = {"schema_version": 2, "features": "emoji", "prompts": 128, "seed": 0, "num_inference_steps": 4}
    rest = {"reference": None, "reference_count": None, "notes": ["few prompts"]}
    return {**about, **rest, "models": models, "comparisons": comparisons, **changes}


def write_evaluation(
    out: Path, models: list[dict[str, Any]], comparisons: list[dict[str, Any]], **changes: Any
) -> Path:
    """Write metrics.json."""
    write_json(out / "metrics.json", evaluation(models, comparisons, **changes))
    return out


def write_noise(out: Path, num_models: int = 2, num_pictures: int = 4, side: int = SIDE) -> Path:
    """An evaluation of models whose pictures are noise."""
    rng = np.random.default_rng(0)
    models, comparisons = [], []
    for index in range(num_models):
        label = f"model-{index}"
        folder = out / "pictures" / label / "seed-0"
        folder.mkdir(parents=True)
        write_json(folder / "prompts.json", {"prompts": [f"{HOSTILE} {i}" for i in range(num_pictures)]})
        for place in range(num_pictures):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{place:04d}.png")
        numbers = {"fid": number(11.0 + index, 10.5 + index, 11.5 + index), "kid": number(0.01)}
        models.append(model(label, numbers, 4_000_000 - index))
        if index:
            fidelity, drop = {"psnr": number(31.25, 30.75, 31.75)}, number(2.5, 2.0, 3.0)
            row = comparison(label, "model-0", fidelity, average_drop=drop, verdict=f"{label} & others")
            comparisons.append(row)
    return write_evaluation(out, models, comparisons, prompts=num_pictures)
