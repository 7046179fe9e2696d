"""Bake the embedded data set: pictures of the Noto emoji and their Unicode CLDR names.

Needs the npm packages ``emoji-datasource-google@16`` (pictures) and ``emojibase-data@17``
(names), installed anywhere:

    npm install emoji-datasource-google@16 emojibase-data@17
    python -m ppcl.emoji.bake node_modules

Writes ``ppcl/assets/data/emoji.webp`` (one sheet of 64 px tiles on white) and
``emoji.json`` (one caption a tile, in order). Skin-tone variants are left out: they are
half of all pictures and differ in colour alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

from PIL import Image

from ppcl.emoji.data import DATA, TILE
from ppcl.errors import UserError
from ppcl.files import atomic_path, write_json

HELD_OUT_SHARE = 0.05


def read_emoji(packages: Path) -> list[dict[str, str]]:
    """Return code, caption and group of every emoji that both packages know, in Unicode order."""
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
        caption = entry["label"].replace("“", "").replace("”", "").replace("’", "'")
        rows.append(
            {"code": picture["unified"], "caption": caption, "group": entry["group"], "image": picture["image"]}
        )
    order = {code: entry["order"] for code, entry in by_code.items() if "order" in entry}
    return sorted(rows, key=lambda row: order[row["code"].replace("-FE0F", "")])


def held_out(code: str) -> bool:
    """Whether an emoji is kept from every training, by a hash of its code point."""
    return int(hashlib.sha256(code.encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT_SHARE


def bake(packages: Path) -> int:
    """Write the sheet and its captions; return the number of pictures."""
    rows, tiles, seen = [], [], set()
    for row in read_emoji(packages):
        path = packages / "emoji-datasource-google" / "img" / "google" / "64" / row.pop("image")
        picture = Image.open(path).convert("RGBA").resize((TILE, TILE), Image.Resampling.LANCZOS)
        tile = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        key = hashlib.sha256(tile.tobytes()).digest()
        if key in seen or row["caption"] in seen:  # some flags share one picture
            continue
        seen |= {key, row["caption"]}
        rows.append({**row, "split": "held-out" if held_out(row["code"]) else "train"})
        tiles.append(tile)
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGB", (columns * TILE, math.ceil(len(tiles) / columns) * TILE), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * TILE, index // columns * TILE))
    with atomic_path(DATA / "emoji.webp") as temporary:
        sheet.save(temporary, format="WEBP", quality=95, method=6)
    write_json(DATA / "emoji.json", {"schema_version": 1, "columns": columns, "emoji": rows})
    return len(tiles)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the node_modules folder")
    print(bake(parser.parse_args().packages), "pictures")
