"""The report's grids of pictures: cards that open the viewer, a filter by prompt, the least and most alike pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppcl.eval.metrics import PSNR_CAP_DB
from ppcl.eval.report_html import number, paragraph, text
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


def lay_out(groups: Sequence[Sequence[Card]]) -> list[list[str]]:
    """HTML of the cards of each group, without those of which a picture cannot be read.

    All pictures of the page share one budget of bytes; those that are shown twice count twice.
    """
    uses = [path for group in groups for card in group for _, path in card.shots]
    uris = thumbnails(uses, PICTURE_BUDGET * len(set(uses)) // max(1, len(uses)))
    return [[_html(card, uris) for card in group if all(path in uris for _, path in card.shots)] for group in groups]


def _html(card: Card, uris: dict[Path, str]) -> str:
    images = "".join(
        f'<img src="{uris[path]}" alt="{text(who)}: {text(card.prompt)}" data-who="{text(who)}">'
        for who, path in card.shots
    )
    labels = "".join(f"<span>{text(who)}</span>" for who, _ in card.shots)
    remark = paragraph(text(card.remark), "soft") if card.remark else ""
    return (
        f'<li class=pair><button type=button aria-label="compare: {text(card.prompt)}">{images}</button>'
        f"<div class=who>{labels}</div><p>{text(card.prompt)}</p>{remark}</li>"
    )


def grid(cards: Sequence[str], css: str = "") -> str:
    """A plain grid; empty without cards."""
    return f'<ul class="pairs{f" {css}" if css else ""}">{"".join(cards)}</ul>' if cards else ""


def gallery(cards: Sequence[str], css: str = "") -> str:
    """The grid with a field that filters by prompt; what goes beyond the first screens is folded away."""
    if not cards:
        return ""
    box = (
        '<div class="filter" hidden><label>Prompts with <input type=search autocomplete=off '
        'placeholder="words in any order"></label><output></output></div>'
    )
    shown = grid(cards[:NUM_OPEN], css)
    if rest := cards[NUM_OPEN:]:
        shown += f"<details><summary>Show the other {len(rest)}</summary>{grid(rest, css)}</details>"
    return f'<div class="gallery">{box}{shown}</div>'


def extremes_html(worst: Sequence[str], best: Sequence[str], names: tuple[str, str], count: int) -> str:
    """The grids of the least and most alike pairs of two models, out of ``count`` pairs; empty without cards."""
    if not worst and not best:
        return ""
    guide = (
        f"{names[1]} against {names[0]}: the least and the most alike of {count} pairs, by PSNR. "
        "A low one is another picture, not always a worse one: look."
    )
    least, most = (f"<h3>{word} alike pairs</h3>" for word in ("Least", "Most"))
    return paragraph(text(guide), "soft") + least + grid(worst) + most + grid(best)
