"""Do the numbers move as they should? The embedded real pictures against damaged copies of themselves.

Command: python benchmarks/metric_sanity.py --table docs/metric_sanity.md
Hardware: one core; one to two minutes.
Expected: distances grow and caption scores fall along a family; half against half is the floor.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table, number, provenance
from ppcl.emoji.data import load_pairs, load_pictures
from ppcl.eval.features import load_extractor
from ppcl.eval.fidelity import psnr, ssim
from ppcl.eval.scoring import Measured, Reference, measure, reference_of

COLUMNS = ("fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "clip_score", "retrieval_at_1")
WORSE_UP = ("fid", "kid", "cmmd")


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of so many pixels."""
    return gaussian_blur(images, [2 * int(3 * sigma) + 1] * 2, [sigma, sigma])


def noisy(images: Tensor, level: float) -> Tensor:
    """Gaussian noise of so many grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images.float() + level * noise).clamp(0, 255).round().to(torch.uint8)


def quantised(images: Tensor, levels: float) -> Tensor:
    """So many levels a colour."""
    step = 255 / (levels - 1)
    return ((images.float() / step).round() * step).round().to(torch.uint8)


FAMILIES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "blur, sigma in pixels": (blurred, (0.5, 1.0, 2.0, 4.0)),
    "noise, sigma in grey levels": (noisy, (8, 16, 32, 64)),
    "quantisation, levels a colour": (quantised, (16, 8, 4, 2)),
}
SHUFFLED = (0.25, 0.5, 1.0)  # shares of the captions


def shuffled(text: Tensor, share: float) -> Tensor:
    """Captions of which so many are passed on to the next picture."""
    chosen = torch.randperm(len(text), generator=torch.Generator().manual_seed(2))[: int(share * len(text))]
    result = text.clone()
    result[chosen] = text[chosen.roll(1)]
    return result


def row(name: str, found: dict[str, Measured], pairs: tuple[float, float] | None = None) -> list[str]:
    """One line of the table."""
    cells = []
    for column in COLUMNS:
        limits = found[column].interval if column in found else None
        cells.append("-" if limits is None else f"{number(limits.value)} ± {number(limits.half_width, 2)}")
    return [name, *cells, *(number(value) for value in pairs or (None, None))]


def sanity(count: int) -> tuple[str, list[str]]:
    """Build the table, and list what does not move as it should."""
    pairs = load_pairs()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    half = min(count, len(pairs) // 2)
    chosen = [pairs[index] for index in order[: 2 * half]]
    images = torch.from_numpy(load_pictures(chosen)).permute(0, 3, 1, 2).contiguous()
    extractor = load_extractor("emoji")
    text = extractor.text_features([pair.caption for pair in chosen[:half]])
    assert text is not None
    ours, reference = images[:half], reference_of(extractor.image_features(images[half:]))
    plain = measure(extractor.image_features(ours), reference, text)
    rows, wrong = [row("half against half (the floor)", plain)], []
    for family, (damage, strengths) in FAMILIES.items():
        before = plain
        for strength in strengths:
            damaged = damage(ours, strength)
            found = measure(extractor.image_features(damaged), reference, text)
            rows.append(row(f"{family}: {strength:g}", found, (psnr(ours, damaged).mean, ssim(ours, damaged).mean)))
            wrong += unordered(f"{family}: {strength:g}", before, found)
            before = found
    rows += shuffles(ours, extractor.image_features(ours), reference, text)
    names = ["", *(name.replace("_", " ") for name in COLUMNS), "PSNR", "SSIM"]
    return markdown_table(names, rows), wrong


def shuffles(ours: Tensor, features: Tensor, reference: Reference, text: Tensor) -> list[list[str]]:
    """The rows with captions that belong to other pictures: only the caption scores may move."""
    return [
        row(f"captions shuffled: {share:.0%}", measure(features, reference, shuffled(text, share)))
        for share in SHUFFLED
    ]


def unordered(name: str, before: dict[str, Measured], after: dict[str, Measured]) -> list[str]:
    """Distances that shrink and caption scores that grow although the pictures get worse, beyond their intervals."""
    found = []
    for column in (*WORSE_UP, "clip_score"):
        one, two = before[column].interval, after[column].interval
        assert one is not None and two is not None
        gain = (one.value - two.value) * (1 if column in WORSE_UP else -1)
        if gain > max(one.half_width, two.half_width):
            found.append(f"{column} gets better at {name}")
    return found


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--count", type=int, default=250, help="pictures on each side")
    arguments.add_argument("--table", type=Path, help="also write the table here, e.g. docs/metric_sanity.md")
    args = arguments.parse_args(argv)
    torch.set_num_threads(1)
    table, wrong = sanity(args.count)
    said = "; ".join(wrong) if wrong else "none"
    text = (
        "# Do the numbers move as they should?\n\n"
        f"Real pictures of the embedded set, {args.count} damaged ones against {args.count} others, embedded "
        "evaluator; ± is half of the 95% interval. PSNR and SSIM compare each damaged picture with itself.\n\n"
        f"{table}\n\nMoves against the order, beyond the interval (FID, KID, CMMD, CLIP score): {said}.\n\n"
    )
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    text += provenance(f"python benchmarks/metric_sanity.py {given}".rstrip(), "cpu") + "\n"
    print(text)
    if args.table:
        write_text(args.table, text)


if __name__ == "__main__":
    main()
