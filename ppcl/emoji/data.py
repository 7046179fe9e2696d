"""The embedded data set: captioned emoji pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppcl.files import read_json

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DATA = ASSETS / "data"
TILE = 64  # pixels of a baked tile
SIZE = 48  # pixels that the embedded teacher draws


@dataclass(frozen=True)
class Emoji:
    """One captioned picture: code point(s), CLDR name, CLDR group number, and split."""

    code: str
    caption: str
    group: int
    split: str


def load_captions(split: str | None = None) -> list[Emoji]:
    """Return the emoji of a split (``train``, ``held-out``, or all), in Unicode order."""
    rows = [Emoji(**row) for row in read_json(DATA / "emoji.json")["emoji"]]
    return [row for row in rows if split in (None, row.split)]


def is_core(row: Emoji) -> bool:
    """Whether an emoji belongs to the core that the shipped teacher was finished on.

    Faces of at most two words; animals, food, travel and activities of one word; none held out.
    """
    words = len(row.caption.split())
    return row.split == "train" and (words <= 2 if row.group == 0 else words == 1 and row.group in (3, 4, 5, 6))


def load_images(size: int = SIZE) -> np.ndarray:
    """Return all pictures, in the order of :func:`load_captions`.

    Returns:
        Array of shape (N, size, size, 3), uint8, on white.
    """
    from PIL import Image

    meta = read_json(DATA / "emoji.json")
    columns = meta["columns"]
    sheet = Image.open(DATA / "emoji.webp").convert("RGB")
    tiles = []
    for index in range(len(meta["emoji"])):
        left, top = index % columns * TILE, index // columns * TILE
        tile = sheet.crop((left, top, left + TILE, top + TILE))
        tiles.append(np.asarray(tile.resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(tiles)
