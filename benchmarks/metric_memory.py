"""Does the metric part need more memory for more pictures? Peak resident memory for several numbers of pictures.

Every number runs in a process of its own, on generated picture files: features of as many drawn and reference
pictures, all set and caption measures with their intervals, paired measures.

Command: python benchmarks/metric_memory.py --table docs/metric_memory.md
Hardware: one core; some minutes for 10,000 pictures of 64 pixels.
Expected: the peak grows by the features (2 x N x D x 4 bytes, and float64 copies), not by the pictures.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table, number, provenance
from ppcl.eval.features import FeatureExtractor, load_extractor
from ppcl.eval.fidelity import psnr, ssim
from ppcl.eval.pictures import compare_pairs, describe, reference_files
from ppcl.eval.scoring import caption_measures, drop, measure, paired, reference_of

WARM = 128  # pictures of the uncounted turn


class Pooled:
    """Features without a network: 8 x 8 mean brightness."""

    name = "pooled"

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 64) of (N, 3, H, W) uint8."""
        return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1), 8).flatten(1) / 255

    def text_features(self, texts: Sequence[str]) -> None:
        """None: the second set stands in for the captions."""


def draw_files(folder: Path, count: int, side: int, seed: int) -> list[Path]:
    """Write pictures of two random colours that flow into each other."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, side)[:, None, None] * np.ones((1, side, 1))
    for index in range(count):
        top, bottom = rng.integers(0, 256, (2, 3))
        pixels = (top * ramp + bottom * (1 - ramp)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.bmp")
    return reference_files(folder)


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def judge(sets: list[list[Path]], extractor: FeatureExtractor, cache: Path) -> int:
    """Everything that is computed about two models' pictures and the real ones; returns the width of the features."""
    drawn, again, real = (describe(files, extractor, cache) for files in sets)
    text = extractor.text_features([f"picture number {index}" for index in range(len(drawn))])
    reference = reference_of(real)
    text = again if text is None else text
    first, second = measure(drawn, reference, text), caption_measures(again, text)
    measures = {"psnr": lambda a, b: psnr(a, b).values, "ssim": lambda a, b: ssim(a, b).values}
    pairs = compare_pairs(sets[0], sets[1], measures)
    for found in (*first.values(), *second.values(), *paired(pairs).values()):
        _ = found.interval
    drop(first, second)
    return drawn.shape[1]


def one(count: int, side: int, features: str) -> dict[str, float]:
    """Run the metric part once; the peak before and after it, and the seconds."""
    torch.set_num_threads(1)
    extractor = Pooled() if features == Pooled.name else load_extractor(features)
    with tempfile.TemporaryDirectory() as folder:
        sets = [draw_files(Path(folder) / str(seed), count, side, seed) for seed in range(3)]
        judge([files[:WARM] for files in sets], extractor, Path(folder) / "warm.safetensors")  # imports, buffers
        before, began = peak_mb(), time.perf_counter()
        width = judge(sets, extractor, Path(folder) / "cache.safetensors")
        return {"before": before, "after": peak_mb(), "seconds": time.perf_counter() - began, "width": width}


def main() -> None:
    """Run every number of pictures in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="1000,10000")
    parser.add_argument("--side", type=int, default=64, help="of the pictures, pixels")
    parser.add_argument("--features", default=Pooled.name, help="that, or what evaluate.features takes")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", type=int, help="this number of pictures, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(args.only, args.side, args.features)))
        return
    rows = []
    for count in map(int, args.counts.split(",")):
        command = [
            sys.executable,
            __file__,
            "--only",
            str(count),
            "--side",
            str(args.side),
            "--features",
            args.features,
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(said)
        pixels = 3 * count * 3 * args.side**2 / 1e6  # three sets
        vectors = 3 * count * found["width"] * 4 / 1e6
        grown = found["after"] - found["before"]
        cells = [f"{count:,}", *(number(v) for v in (found["before"], found["after"], grown, pixels, vectors))]
        rows.append([*cells, number(found["seconds"])])
    header = ["pictures a set", "peak before, MB", "peak after, MB", "grown by, MB", "all pixels would be, MB"]
    table = markdown_table([*header, "features, MB", "seconds"], rows)
    what = "FID, KID, CMMD, precision, recall, density, coverage and caption scores of the first set"
    text = (
        f"# Memory of the metric part\n\nThree sets of generated pictures ({args.side} pixels): drawn, drawn by a "
        f"second model, real. Features of all ({args.features}); {what}; PSNR and SSIM of each pair of the first two; "
        f"the average drop; the bootstrap intervals. Before: the same done with {WARM} pictures a set. A network adds "
        f"its weights and one chunk of 64 pictures, whatever the number.\n\n{table}\n\n"
        f"{provenance('python benchmarks/metric_memory.py ' + shlex.join(sys.argv[1:]), 'cpu')}\n"
    )
    print(text)
    if args.table:
        write_text(args.table, text)


if __name__ == "__main__":
    main()
