"""The report's grids of pictures: cards that open the viewer, a filter by prompt, the least and most alike pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from ppcl.eval.metrics import PSNR_CAP_DB
from ppcl.eval.report_html import number, render
from ppcl.eval.report_pictures import PICTURE_BUDGET, Pair, small_picture, thumbnails

NUM_OPEN = 20  # cards shown before a reader unfolds the rest
NUM_TRIPLES = 6  # pairs that are shown again beside the teacher's other seed
NUM_EXTREMES = 4  # least and most alike pairs, each
MAX_MEASURED = 512  # pairs whose likeness is computed, at most: reading pictures takes the time
WHOLE = 1 << 16  # a side in pixels that no picture has: nothing is scaled


@dataclass(frozen=True)
class Card:
    """Pictures of one prompt.

    Attributes:
        prompt: What they show.
        shots: (who drew it, file), in the order of the page.
        remark: A line under the prompt.
    """

    prompt: str
    shots: tuple[tuple[str, Path], ...]
    remark: str = ""


def pair_psnr(first: Path, second: Path) -> float | None:
    """PSNR of two picture files in dB, at most 100; None where one is unreadable or their sizes differ."""
    left, right = small_picture(first, WHOLE), small_picture(second, WHOLE)
    if left is None or right is None or left.size != right.size:
        return None
    error = float(np.mean(((np.asarray(left, np.float64) - np.asarray(right, np.float64)) / 255) ** 2))
    return min(PSNR_CAP_DB, -10 * math.log10(error)) if error else PSNR_CAP_DB


def extremes(pairs: Sequence[Pair], names: tuple[str, str] = ("teacher", "student")) -> tuple[list[Card], list[Card]]:
    """The least and the most alike pairs by PSNR, none in both lists.

    Args:
        pairs: Candidates; unreadable ones and those of two sizes are passed over.
        names: Who drew the first and the second picture.

    Returns:
        (least alike first, most alike first), at most ``NUM_EXTREMES`` each.
    """
    by_psnr = [(value, pair) for pair in pairs if (value := pair_psnr(pair.teacher, pair.student)) is not None]
    by_psnr.sort(key=lambda item: item[0])
    count = min(NUM_EXTREMES, len(by_psnr) // 2)
    cards = [
        Card(pair.prompt, ((names[0], pair.teacher), (names[1], pair.student)), f"PSNR {number(value)} dB")
        for value, pair in by_psnr
    ]
    return cards[:count], cards[::-1][:count]


@dataclass(frozen=True)
class Laid:
    """A card as the page has it: (who drew it, the picture as data) in the place of files."""

    prompt: str
    images: tuple[tuple[str, str], ...]
    remark: str


def lay_out(groups: Sequence[Sequence[Card]]) -> list[list[Laid]]:
    """The cards of each group with their pictures, without those of which a picture cannot be read.

    All pictures of the page share one budget of bytes; those that are shown twice count twice.
    """
    uses = [path for group in groups for card in group for _, path in card.shots]
    uris = thumbnails(uses, PICTURE_BUDGET * len(set(uses)) // max(1, len(uses)))
    return [
        [
            Laid(card.prompt, tuple((who, uris[path]) for who, path in card.shots), card.remark)
            for card in group
            if all(path in uris for _, path in card.shots)
        ]
        for group in groups
    ]


def gallery(cards: Sequence[Laid], css: str = "") -> Markup:
    """The grid with a field that filters by prompt; what goes beyond the first screens is folded away."""
    return render("gallery.html", cards=cards, css=css, num_open=NUM_OPEN)
