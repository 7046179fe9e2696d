"""Pictures that were drawn before: a set of them in one file, named after everything that they depend on.

    python -m ppcl.eval.drawn RUN/eval/teacher ppcl/assets/drawn

makes a store of a model's pictures in a finished run, a set a seed, in the place of what the store held.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppcl.common.files import atomic_path, digest, read_json
from ppcl.common.pictures import open_picture

COLUMNS = 16
SETTINGS_FILE = "prompts.json"  # beside pictures: what they depend on


def set_of(store: Path | None, settings: dict[str, Any]) -> Path | None:
    """The file of a store that holds what would be drawn with these settings, if there is one."""
    path = store / f"{digest(settings)}.webp" if store else None
    return path if path is not None and path.is_file() else None


def pack(paths: list[Path], settings: dict[str, Any], store: Path) -> Path:
    """Put pictures of one size into one file of a store, losslessly.

    Args:
        paths: One picture a prompt.
        settings: What they were drawn with, see :func:`ppcl.eval.generate.picture_settings`.
        store: A folder that exists.
    """
    tiles = np.stack([np.array(open_picture(path)) for path in paths])
    count, height, width, _ = tiles.shape
    rows = -(-count // COLUMNS)
    grid = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    grid[:count] = tiles
    sheet = grid.reshape(rows, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
    place = store / f"{digest(settings)}.webp"
    with atomic_path(place) as temporary:
        Image.fromarray(sheet.reshape(rows * height, COLUMNS * width, 3)).save(
            temporary, format="WEBP", lossless=True, method=6
        )
    return place


def unpack(drawn: Path, paths: list[Path]) -> None:
    """Write the pictures of a set, one a path, in the order in which they were put in."""
    sheet = open_picture(drawn)
    width, height = sheet.width // COLUMNS, sheet.height // -(-len(paths) // COLUMNS)
    for index, path in enumerate(paths):
        left, top = index % COLUMNS * width, index // COLUMNS * height
        with atomic_path(path) as temporary:
            sheet.crop((left, top, left + width, top + height)).save(temporary, format="PNG")


def main() -> None:
    """The command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="holds folders seed-0, seed-1 ...")
    parser.add_argument("store", type=Path)
    given = parser.parse_args()
    sets = sorted(given.pictures.glob("seed-*"))
    if not sets:
        parser.error(f"{given.pictures} holds no folders seed-0, seed-1 ...; give RUN/eval/teacher of a finished run")
    with atomic_path(given.store) as temporary:
        temporary.mkdir()
        for folder in sets:
            pack(sorted(folder.glob("*.png")), read_json(folder / SETTINGS_FILE), temporary)


if __name__ == "__main__":
    main()
