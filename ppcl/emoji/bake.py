"""Bake the embedded data set: Noto emoji with transparency and their Unicode CLDR names.

Needs the npm packages ``emoji-datasource-google@16`` (pictures) and ``emojibase-data@17``
(names), installed anywhere:

    npm install emoji-datasource-google@16 emojibase-data@17
    python -m ppcl.emoji.bake node_modules

Writes ``ppcl/assets/data/emoji.webp`` (one sheet of 64 px tiles) and ``emoji.json`` (one
name a tile, in order). Of all emoji it takes those that are told apart by shape and named in
a word or two: see :func:`is_wanted`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl.common.files import atomic_path, write_json
from ppcl.emoji.data import DATA, TILE
from ppcl.errors import UserError

FACES, ANIMALS, FOOD, TRAVEL, ACTIVITIES = 0, 3, 4, 5, 6  # CLDR group numbers


def read_emoji(packages: Path) -> list[dict[str, Any]]:
    """Return code, name and group of every emoji that both packages know, in Unicode order."""
    names = packages / "emojibase-data" / "en" / "data.json"
    pictures = packages / "emoji-datasource-google" / "emoji.json"
    if not names.is_file() or not pictures.is_file():
        raise UserError(f"{packages} lacks emojibase-data or emoji-datasource-google; install both with npm there")
    by_code = {entry["hexcode"].replace("-FE0F", ""): entry for entry in json.loads(names.read_text("utf-8"))}
    rows = []
    for picture in json.loads(pictures.read_text("utf-8")):
        entry = by_code.get(picture["unified"].replace("-FE0F", ""))
        if entry is None or "group" not in entry or not picture["has_img_google"]:
            continue
        name = entry["label"].replace("“", "").replace("”", "").replace("’", "'")
        rows.append({"code": picture["unified"], "name": name, "group": entry["group"], "image": picture["image"]})
    order = {code: entry["order"] for code, entry in by_code.items() if "order" in entry}
    return sorted(rows, key=lambda row: order[row["code"].replace("-FE0F", "")])


def is_wanted(name: str, group: int) -> bool:
    """Whether an emoji is taken: faces of at most two words; animals, food, travel and activities of one word.

    People differ in details of a few pixels, flags and symbols in little but colour.
    """
    words = len(name.split())
    return words <= 2 if group == FACES else words == 1 and group in (ANIMALS, FOOD, TRAVEL, ACTIVITIES)


def bake(packages: Path) -> int:
    """Write the sheet and its captions; return the number of pictures."""
    rows, tiles, seen = [], [], set()
    for row in read_emoji(packages):
        if not is_wanted(row["name"], row["group"]) or row["name"] in seen:
            continue
        path = packages / "emoji-datasource-google" / "img" / "google" / "64" / row.pop("image")
        seen.add(row["name"])
        rows.append(row)
        tiles.append(Image.open(path).convert("RGBA").resize((TILE, TILE), Image.Resampling.LANCZOS))
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGBA", (columns * TILE, math.ceil(len(tiles) / columns) * TILE))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * TILE, index // columns * TILE))
    with atomic_path(DATA / "emoji.webp") as temporary:
        sheet.save(temporary, format="WEBP", quality=95, alpha_quality=100, method=6)
    write_json(DATA / "emoji.json", {"schema_version": 2, "columns": columns, "emoji": rows})
    return len(tiles)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the node_modules folder")
    print(bake(parser.parse_args().packages), "pictures")
