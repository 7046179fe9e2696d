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
from ppcl.emoji.data import load_pairs
from ppcl.emoji.variation import load_varied_pictures
from ppcl.eval.features import load_extractor
from ppcl.eval.fidelity import psnr, ssim
from ppcl.eval.scoring import Measured, Reference, measure, reference_of
from ppcl.eval.texture import texture_distance, texture_features

SETS = ("fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "clip_score", "retrieval_at_1")
COLUMNS = ("texture_distance", *SETS)
WORSE_UP = ("texture_distance", "fid", "kid", "cmmd")


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


def without_detail(images: Tensor, side: float) -> Tensor:
    """The median of so many pixels a side: lines and dots that are narrower are gone, edges stay."""
    window = int(side)
    padded = torch.nn.functional.pad(images.float(), [window // 2] * 4, mode="replicate")
    places = padded.unfold(2, window, 1).unfold(3, window, 1).flatten(-2)
    return places.median(-1).values.round().to(torch.uint8)


def swapped(images: Tensor, share: float) -> Tensor:
    """So much of the fine detail of each picture is that of the next one."""
    coarse = gaussian_blur(images.float(), [7, 7], [1.0, 1.0])
    fine = images.float() - coarse
    return (coarse + (1 - share) * fine + share * fine.roll(1, 0)).clamp(0, 255).round().to(torch.uint8)


FAMILIES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "blur, sigma in pixels": (blurred, (0.5, 0.7, 1.0, 2.0, 4.0)),
    "missing detail, median of so many pixels": (without_detail, (3, 5, 7)),
    "swapped texture, share": (swapped, (0.25, 0.5, 1.0)),
    "noise, sigma in grey levels": (noisy, (4, 8, 16, 32, 64)),
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


def registers(plain: dict[str, Measured], found: dict[str, Measured]) -> dict[str, bool]:
    """Which distances tell damaged pictures from others: by more than both intervals."""
    told = {}
    for column in WORSE_UP:
        one, two = plain[column].interval, found[column].interval
        assert one is not None and two is not None
        told[column] = two.low > one.high
    return told


def sanity(count: int) -> tuple[str, list[str], list[list[str]]]:
    """Build the table, list what does not move as it should, and the weakest damage that each distance tells."""
    pairs = load_pairs()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    half = min(count, len(pairs) // 2)
    chosen = [pairs[index] for index in order[: 2 * half]]
    images = torch.from_numpy(load_varied_pictures(chosen, 0)).permute(0, 3, 1, 2).contiguous()
    extractor = load_extractor("emoji")
    text = extractor.text_features([pair.caption for pair in chosen[:half]])
    assert text is not None
    ours, reference = images[:half], reference_of(extractor.image_features(images[half:]))
    texture = texture_features(images[half:])

    def measured(pictures: Tensor) -> dict[str, Measured]:
        detail = texture_distance(texture_features(pictures), texture)
        found = measure(extractor.image_features(pictures), reference, text)
        return {"texture_distance": Measured(detail.value, detail.items.numpy()), **found}

    plain = measured(ours)
    rows, wrong, weakest = [row("half against half (the floor)", plain)], list[str](), list[list[str]]()
    for family, (damage, strengths) in FAMILIES.items():
        before, told = plain, dict[str, float]()
        for strength in strengths:
            damaged = damage(ours, strength)
            found = measured(damaged)
            rows.append(row(f"{family}: {strength:g}", found, (psnr(ours, damaged).mean, ssim(ours, damaged).mean)))
            wrong += unordered(f"{family}: {strength:g}", before, found)
            before = found
            for column, does in registers(plain, found).items():
                if does:
                    told.setdefault(column, strength)
        weakest.append([family, *(f"{told[column]:g}" if column in told else "-" for column in WORSE_UP)])
    rows += shuffles(extractor.image_features(ours), reference, text)
    names = ["", *(name.replace("_", " ") for name in COLUMNS), "PSNR", "SSIM"]
    return markdown_table(names, rows), wrong, weakest


def shuffles(features: Tensor, reference: Reference, text: Tensor) -> list[list[str]]:
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
    table, wrong, first = sanity(args.count)
    said = "; ".join(wrong) if wrong else "none"
    text = (
        "# Do the numbers move as they should?\n\n"
        f"Real pictures of the embedded set, varied, {args.count} damaged ones against {args.count} others, "
        "embedded evaluator; texture distance needs none; ± is half of the 95% interval. PSNR and SSIM compare each "
        "damaged picture with itself.\n\n"
        f"{table}\n\nMoves against the order, beyond the interval (distances, CLIP score): {said}.\n\n"
        "The weakest damage that each distance tells from none, its interval above that of the floor (-: not even the "
        f"strongest here):\n\n{markdown_table(['', *(name.replace('_', ' ') for name in WORSE_UP)], first)}\n\n"
    )
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    text += provenance(f"python benchmarks/metric_sanity.py {given}".rstrip(), "cpu") + "\n"
    print(text)
    if args.table:
        write_text(args.table, text)


if __name__ == "__main__":
    main()
