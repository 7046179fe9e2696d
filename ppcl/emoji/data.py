"""The embedded data set: emoji on coloured grounds, with captions.

A picture is one emoji on one ground; its caption is ``dolphin`` on white and ``dolphin on
blue`` on blue. So captions are made of parts, as prompts are: a model can be asked for a
pair that it has never seen although it knows both halves. Three splits follow:

* ``train``: what VAE, evaluator and teacher are trained on;
* ``new pair``: a known emoji on a known ground, never seen together;
* ``new emoji``: an emoji that nothing was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ppcl.common.files import read_json

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DATA = ASSETS / "data"
DRAWN = ASSETS / "drawn"  # pictures of the embedded teacher
TILE = 64  # pixels of a baked tile
SIZE = 48  # pixels that the embedded teacher draws
PLAIN = "white"  # the ground that captions do not name
GROUNDS = {
    PLAIN: (255, 255, 255),
    "red": (229, 115, 115),
    "yellow": (255, 224, 130),
    "green": (129, 199, 132),
    "blue": (100, 181, 246),
    "purple": (186, 104, 200),
    "black": (33, 33, 33),
}
NEW_EMOJI_SHARE, NEW_PAIR_SHARE = 0.05, 0.1


@dataclass(frozen=True)
class Emoji:
    """One emoji: code point(s), CLDR name, CLDR group number."""

    code: str
    name: str
    group: int


@dataclass(frozen=True)
class Pair:
    """One captioned picture: the emoji's place in the sheet, its ground, the caption, the split."""

    tile: int
    ground: str
    caption: str
    split: str


def in_share(text: str, share: float) -> bool:
    """Whether a hash of the text falls into the given share; the same everywhere and for ever."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < share


def _split(emoji: Emoji, ground: str) -> str:
    if in_share(emoji.code, NEW_EMOJI_SHARE):
        return "new emoji"
    # every emoji is seen on white, or its name could mean anything
    return "new pair" if ground != PLAIN and in_share(f"{emoji.code} {ground}", NEW_PAIR_SHARE) else "train"


@lru_cache
def load_emoji() -> tuple[Emoji, ...]:
    """Return the emoji of the sheet, in Unicode order."""
    return tuple(Emoji(**row) for row in read_json(DATA / "emoji.json")["emoji"])


@lru_cache
def load_pairs(split: str | None = None) -> tuple[Pair, ...]:
    """Return the pairs of a split (all without one), in rounds.

    One round names every emoji once, each on another ground than in the round before, so the
    first so many pairs of a split cover as many emoji and as many grounds as they can.
    """
    names = list(GROUNDS)
    pairs = []
    for turn in range(len(names)):
        for tile, emoji in enumerate(load_emoji()):
            ground = names[(tile + turn) % len(names)]
            caption = emoji.name if ground == PLAIN else f"{emoji.name} on {ground}"
            pairs.append(Pair(tile, ground, caption, _split(emoji, ground)))
    return tuple(pair for pair in pairs if split in (None, pair.split))


def load_tiles(size: int = SIZE) -> np.ndarray:
    """Return the bare emoji, (N, size, size, 4) uint8 with straight alpha, in the order of :func:`load_emoji`."""
    columns = read_json(DATA / "emoji.json")["columns"]
    sheet = Image.open(DATA / "emoji.webp").convert("RGBA")
    tiles = []
    for index in range(len(load_emoji())):
        left, top = index % columns * TILE, index // columns * TILE
        tile = sheet.crop((left, top, left + TILE, top + TILE))
        tiles.append(np.asarray(tile.resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(tiles)


def load_pictures(pairs: Sequence[Pair], size: int = SIZE) -> np.ndarray:
    """Return the pictures of pairs, (N, size, size, 3) uint8."""
    tiles = load_tiles(size)[[pair.tile for pair in pairs]].astype(np.float32)
    grounds = np.array([GROUNDS[pair.ground] for pair in pairs], np.float32)[:, None, None]
    alpha = tiles[..., 3:] / 255
    return np.round(tiles[..., :3] * alpha + grounds * (1 - alpha)).astype(np.uint8)
