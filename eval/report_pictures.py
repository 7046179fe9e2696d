"""Teacher and student pictures of the same prompt and seed: thumbnails for the report, a sheet for the README."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ppcl.common.files import atomic_path, read_json
from ppcl.common.pictures import BadPicture, open_picture
from ppcl.errors import ArtifactError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_PAIRS = 64
SHOWN = 300  # characters of a prompt, which stands on the page several times for each picture
PICTURE_BUDGET = 3_000_000  # bytes of all encoded pictures; base64 adds a third, the page stays under 5 MB
SIDES = (256, 192, 144, 112, 80, 56)  # longest side of a thumbnail in pixels, tried in turn
LOSSLESS_SIDE = 96  # pictures up to this size are small enough to keep every pixel


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and seed."""

    prompt: str
    teacher: Path
    student: Path


def seed_folders(folder: Path) -> list[Path]:
    """Folders of drawn pictures, ``seed-<s>``, in the order of their seeds."""

    def seed(path: Path) -> tuple[int, str]:
        digits = path.name.removeprefix("seed-")
        return (int(digits), "") if digits.isdecimal() else (1 << 62, digits)

    return sorted((p for p in folder.glob("seed-*") if p.is_dir()), key=seed)


def prompts_of(folder: Path) -> list[str]:
    """The prompts of a folder of drawn pictures, their beginnings if they are long; empty if they are not recorded."""
    try:
        data = read_json(folder / "prompts.json")
    except ArtifactError as error:
        logger.warning("the report shows pictures without their prompts: %s", error)
        return []
    prompts = data.get("prompts") if isinstance(data, dict) else None
    return [shorten(str(prompt), SHOWN) for prompt in prompts] if isinstance(prompts, list) else []


def shorten(text: str, size: int) -> str:
    """A text of at most so many characters; what is cut off ends in an ellipsis."""
    return text if len(text) <= size else text[: size - 1] + "\N{HORIZONTAL ELLIPSIS}"


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` items, evenly spaced, so that nobody picks them by hand."""
    if len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def find_pairs(run: Path, limit: int = MAX_PAIRS) -> list[Pair]:
    """Pictures that both models drew for the same prompt and seed, at most ``limit``, evenly spaced.

    Empty before the evaluate stage.
    """
    students = seed_folders(run / "eval" / "student")
    teachers = {p.name: p for p in seed_folders(run / "eval" / "teacher")}
    shared = [p for p in students if p.name in teachers]
    if not shared:
        return []
    student, teacher = shared[0], teachers[shared[0].name]
    prompts = prompts_of(teacher)
    pairs = []
    for path in sorted(student.glob("[0-9]*.png")):
        twin, index = teacher / path.name, int(path.stem) if path.stem.isdecimal() else -1
        if twin.is_file():
            prompt = prompts[index] if 0 <= index < len(prompts) else f"picture {path.stem}"
            pairs.append(Pair(prompt, twin, path))
    return spread(pairs, limit)


def small_picture(path: Path, side: int) -> Image.Image | None:
    """Read a picture, its longest side at most ``side`` pixels; None if it cannot be read."""
    from PIL import Image

    try:
        picture = open_picture(path)
    except BadPicture as bad:
        logger.warning("the report leaves out %s: %s", path, bad)
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _encode(picture: Image.Image, side: int) -> bytes:
    from PIL import Image

    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=max(picture.size) <= LOSSLESS_SIDE, quality=85, method=4)
    return buffer.getvalue()


def thumbnails(paths: Sequence[Path], budget: int = PICTURE_BUDGET) -> dict[Path, str]:
    """Data URIs of the readable pictures, all at the largest size that fits the budget.

    Args:
        paths: Picture files.
        budget: Bytes that all of them may take before base64.
    """
    opened = {path: small_picture(path, SIDES[0]) for path in dict.fromkeys(paths)}
    pictures = {path: picture for path, picture in opened.items() if picture is not None}
    encoded: dict[Path, bytes] = {}
    for side in SIDES:
        encoded = {path: _encode(picture, side) for path, picture in pictures.items()}
        if sum(map(len, encoded.values())) <= budget:
            break
    return {path: "data:image/webp;base64," + base64.b64encode(data).decode() for path, data in encoded.items()}


def readme_picture(run: Path, out: Path, columns: int = 8) -> None:
    """Write a PNG contact sheet: the teacher's row above the student's, prompts underneath.

    The prompts are evenly spaced over those of the evaluation, not chosen.

    Args:
        run: Run directory with an evaluation.
        out: PNG file to write.
        columns: Number of prompts, at most.

    Raises:
        ArtifactError: The run has no pictures of both models, or none of them can be read.
    """
    from PIL import Image, ImageDraw

    cell, gap, side, line = 144, 8, 92, 19  # pixels
    pairs = find_pairs(Path(run), columns)
    opened = [(p.prompt, small_picture(p.teacher, cell), small_picture(p.student, cell)) for p in pairs]
    rows = [(prompt, teacher, student) for prompt, teacher, student in opened if teacher and student]
    if not rows:
        raise ArtifactError(f"{run} holds no pictures of teacher and student; run its evaluate stage first")
    captions = [_wrap(prompt, _font(14), cell, lines=3) for prompt, _, _ in rows]
    height = 2 * (cell + gap) + 2 * gap + line * max(map(len, captions))
    sheet = Image.new("RGB", (side + len(rows) * (cell + gap) + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(("teacher", "student")):
        middle = gap + row * (cell + gap) + cell // 2
        draw.text((gap, middle), name, fill="#3b424c", font=_font(18), anchor="lm")
    for column, (_, teacher, student) in enumerate(rows):
        left = side + gap + column * (cell + gap)
        for row, picture in enumerate((teacher, student)):
            sheet.paste(_fill(picture, cell), (left, gap + row * (cell + gap)))
        for index, words in enumerate(captions[column]):
            top = 2 * (cell + gap) + gap + line * index
            draw.text((left + cell // 2, top), words, fill="#3b424c", font=_font(14), anchor="ma")
    with atomic_path(out) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: Pillow's own font lacks most of Unicode."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fill(picture: Image.Image, side: int) -> Image.Image:
    """The picture scaled to fit a white square."""
    from PIL import Image, ImageOps

    return ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC, color="white")


def _wrap(prompt: str, font: FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break a prompt into at most ``lines`` lines of ``width`` pixels; what is cut off ends in an ellipsis."""
    rows = [""]
    for word in prompt.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + "\N{HORIZONTAL ELLIPSIS}"]
    return [_shorten(row, font, width) for row in rows]


def _shorten(row: str, font: FreeTypeFont, width: int) -> str:
    if font.getlength(row) <= width:
        return row
    while row and font.getlength(row + "\N{HORIZONTAL ELLIPSIS}") > width:
        row = row[:-1]
    return row + "\N{HORIZONTAL ELLIPSIS}"
