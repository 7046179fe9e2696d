"""A run directory as the report finds it, made up in a second; pictures included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.common.artifacts import save_artifact
from ppcl.common.files import write_json
from ppcl.pruning.artifacts import Candidate, Candidates
from ppcl.student.plan import CompressionPlan, Prediction, Segment
from ppcl.teacher.model_info import ModelInfo, Stack

NUM_BLOCKS = 24
RUNS = ((3, 5), (8, 11), (13, 15), (18, 19))
STACK = "transformer_blocks"
HOSTILE = "<script>alert(\"x\")</script> & 'quoted'"


def make_model(num_blocks: int = NUM_BLOCKS) -> ModelInfo:
    """A teacher of one stack with equal blocks."""
    stack = Stack(STACK, "num_layers", num_blocks, (590_000,) * num_blocks, (19_000_000,) * num_blocks)
    return ModelInfo("QwenImageTransformer2DModel", "abc", 14_400_000, 470_000_000, 4, 60_000_000, (stack,))


def make_analysis(num_blocks: int = NUM_BLOCKS) -> Analysis:
    """A plausible analysis: the first and last blocks are the least linear."""
    rng = np.random.default_rng(0)
    effect = 0.004 + 0.05 * np.abs(np.linspace(-1, 1, num_blocks)) ** 4 + 0.004 * rng.random(num_blocks)

    def row(u: int) -> tuple[float | None, ...]:
        losses = [float(effect[u : k + 1].sum() * (1 + 0.2 * (k - u))) for k in range(u, num_blocks)]
        return (None,) * u + tuple(1 - loss for loss in losses)

    cka = tuple(row(u) for u in range(num_blocks))
    error = tuple(float(x) for x in 0.08 + 6 * effect)
    stack = StackAnalysis(
        name=STACK,
        cka=cka,
        cka_by_stream={"img": cka, "txt": cka},
        intervals=((2, 5), (8, 10), (12, 16)),
        probe_error={"img": error, "txt": tuple(0.7 * e for e in error)},
        ridge={"img": (1e-4,) * num_blocks, "txt": (1e-4,) * num_blocks},
        influence=tuple(float(x) for x in 3 * effect),
        ffn_linearity={"img": tuple(1.4 * e for e in error), "txt": (None, *error[1:])},
        text_linearity={"input": (None, *error[1:]), "output": (None, *(0.5 * e for e in error[1:]))},
    )
    return Analysis(make_model(num_blocks), (stack,), 1024, {"img": 36_864, "txt": 12_288}, 41.2)


def make_candidates() -> Candidates:
    """Every run of two to four blocks; the longest are not fitted."""
    rng = np.random.default_rng(1)
    found = []
    for first in range(1, NUM_BLOCKS - 4):
        for last in range(first + 1, first + 4):
            probe = 0.04 * (last - first) * (1 + float(rng.random()))
            taken = (first, last) in RUNS
            fitted = None if last - first == 3 and not taken else probe * (0.4 + 0.2 * float(rng.random()))
            found.append(Candidate(STACK, first, last, probe, "middle" if fitted else None, fitted))
    return Candidates(tuple(found), 50, 98.0)


def make_plan(width: dict[str, Any] | None = None) -> CompressionPlan:
    """Merge ``RUNS``; ``width`` goes into the first kept block."""
    segments, block = [Segment(0, 0, width=width or {})], 1
    while block < NUM_BLOCKS:
        last = next((b for a, b in RUNS if a == block), block)
        segments.append(Segment(block, last, "middle" if last > block else None))
        block = last + 1
    predicted = Prediction(9_700_000, 0.674, 1.49, 98_800_000, 0.127)
    return CompressionPlan(make_model(), "optimal", {"keep": 0.7}, {STACK: tuple(segments)}, predicted)


def make_metrics() -> dict[str, Any]:
    """The content of eval/metrics.json."""

    def side(params: int, fid: float, clip: float, latency: float) -> dict[str, float]:
        return {
            "params": params,
            "fid": fid,
            "clip_score": clip,
            "retrieval_at_1": clip / 60,
            "retrieval_at_5": clip / 45,
            "latency_ms": latency,
            "latency_end_to_end_ms": 22 * latency,
            "peak_memory_bytes": params * 40,
        }

    values = {"fid": [31.0, 32.2], "clip_score": [28.3, 28.1]}
    values |= {"retrieval_at_1": [0.47, 0.5], "retrieval_at_5": [0.63, 0.64]}
    return {
        "schema_version": 1,
        "features": "emoji",
        "num_inference_steps": 20,
        "samples": {"prompts": 128, "references": 400, "teacher_seeds": 2},
        "teacher": side(14_400_000, 31.0, 28.3, 24.5),
        "student": side(9_700_000, 36.4, 27.7, 16.9),
        "teacher_spread": {
            k: {"mean": sum(v) / 2, "std": abs(v[0] - v[1]) / math.sqrt(2), "values": v} for k, v in values.items()
        },
        "fidelity": {
            "psnr": 21.4,
            "ssim": 0.83,
            "feature_cosine": 0.94,
            "velocity_error": 0.061,
            "velocity_error_undistilled": 0.142,
            "teacher_psnr_other_seed": 12.8,
        },
        "average_drop": 2.12,
        "average_drop_per_metric": {"clip_score": 2.1, "retrieval_at_1": 2.1, "retrieval_at_5": 2.2},
        "fid_ratio": 1.17,
        "fid_reference": "real",
        "param_ratio": 0.674,
        "speedup": 1.45,
        "speedup_end_to_end": 1.38,
    }


def write_pictures(run: Path, prompts: list[str], side: int = 48, noise: bool = False) -> None:
    """Teacher with two seeds, student with one: a disc a prompt, or noise that no codec can shrink."""
    rng = np.random.default_rng(2)
    grid = np.mgrid[:side, :side] / side
    for name, shift in (("teacher/seed-0", 0.0), ("student/seed-0", 0.03), ("teacher/seed-1", 0.2)):
        folder = run / "eval" / name
        folder.mkdir(parents=True)
        write_json(folder / "prompts.json", {"prompts": prompts, "seed": int(name[-1])})
        for index in range(len(prompts)):
            pixels = np.full((side, side, 3), 255, np.uint8)
            inside = (grid[0] - 0.5) ** 2 + (grid[1] - 0.4 - shift) ** 2 < 0.1
            pixels[inside] = (40 + 3 * index % 200, 120, 200)
            if noise:
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:04d}.png")


def write_log(run: Path) -> None:
    """Three stages, a repeated stretch after a resume, and a last line that was cut off."""
    rng = np.random.default_rng(3)
    lines = []
    for stage, steps in (("fit", 50), ("distill.local", 300), ("distill.output", 200)):
        for step in [*range(steps), *range(steps - 10, steps)]:
            loss = math.exp(-3 * step / steps) * (0.2 + 0.05 * float(rng.random()))
            row = {"stage": stage, "step": step, "loss": loss, "learning_rate": 1e-3, "seconds": 0.2}
            lines.append(json.dumps(row))
    (run / "log.jsonl").write_text("\n".join(lines) + '\n{"stage": "distill.output", "st', encoding="utf-8")


def write_run(run: Path, prompts: list[str]) -> Path:
    """A complete run directory."""
    run.mkdir(parents=True, exist_ok=True)
    config = {
        "command": "ppcl compress emoji --out runs/emoji --keep 0.7",
        "versions": {"ppcl": "0.1.0", "torch": "2.9.0", "diffusers": "0.36.0"},
        "seed": 0,
        "device": "cpu",
        "git_commit": "0123abc",
        "model": "emoji",
        "config": {"plan": {"mode": "optimal", "keep": 0.7}, "distill": {"local_steps": 300}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    save_artifact(make_analysis(), run / "analysis.json")
    save_artifact(make_candidates(), run / "candidates.json")
    save_artifact(make_plan(), run / "plan.json")
    write_log(run)
    write_json(run / "eval" / "metrics.json", make_metrics())
    write_pictures(run, prompts)
    write_json(run / "pipeline" / "model_index.json", {})
    seconds = {"capture": 61.0, "analyze": 41.2, "fit": 98.0, "plan": 0.2, "distill": 190.5, "evaluate": 122.0}
    write_json(run / "stages.json", {name: {"seconds": value} for name, value in seconds.items()})
    return run
