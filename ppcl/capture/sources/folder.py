"""A folder of pictures: captions in a table, or in a file of the picture's name beside it.

Tables are those of Hugging Face's imagefolder (``metadata.jsonl``, ``metadata.csv``) and of the common trainers: any
JSON lines, JSON, CSV or TSV file with a column that names pictures. One stands for its folder and all below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ppcl.capture.sources.base import (
    CAPTIONS,
    MAX_CAPTION_BYTES,
    BadSample,
    Entry,
    Skipped,
    Source,
    caption_of,
    decode,
    shuffled,
    text_of,
)
from ppcl.common.outside import is_text
from ppcl.common.pictures import picture_files
from ppcl.common.reading import parse_json
from ppcl.common.rows import SUFFIXES, Row, column, columns, read_rows, read_text
from ppcl.config import CaptureConfig
from ppcl.errors import UserError

# what imagefolder and trainers call the column of file names
FILES = (
    *("file_name", "filename", "file", "file_path", "filepath", "image_path", "image_file", "image_name", "image"),
    *("img_path", "img", "media_path", "path"),
)
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
Found = tuple[str, Path, Callable[[], str]]  # name, picture, caption


class Folder(Source):
    """Pictures as files.

    With a table (``{"file_name": "0001.png", "text": "a red cat"}``) its rows are the samples, without one all pictures
    below the folder are.

    Args:
        path: The folder, or the table itself.
        settings: ``caption_column`` names the caption in tables; ``data_split`` the folder to take where there are
            several of such names.
    """

    def __init__(self, path: Path, settings: CaptureConfig) -> None:
        self.table = path if path.is_file() else None
        self.path, self.column = path.parent if self.table else path, settings.caption_column
        self.columns = (settings.source_column,) if settings.source_column else FILES
        if not self.table and not _tables(self.path):
            folders = {entry.name for entry in self.path.iterdir() if entry.is_dir() and entry.name[0] != "."}
            if settings.data_split in folders <= SPLITS:
                self.path = path / settings.data_split

    def entries(self, seed: int, skipped: Skipped) -> Iterator[Entry]:
        """See :meth:`Source.entries`."""
        found = self._found(skipped)
        for index in shuffled(len(found), seed):
            name, picture, caption = found[index]
            yield Entry(name, caption, partial(decode, picture))

    def _found(self, skipped: Skipped) -> list[Found]:
        """All samples, those of tables first."""

        def unreadable(error: OSError) -> None:
            skipped.add(str(error.filename), BadSample("unreadable folder", error.strerror or str(error)))

        files = [] if self.table or self.columns != FILES else picture_files(self.path, unreadable)
        found: list[Found] = []
        listed: list[Path] = []  # folders that a table stands for
        for folder in [self.path] if self.table else self._folders():
            if not any(folder.is_relative_to(other) for other in listed):
                samples = self._listed([self.table] if self.table else _tables(folder), skipped)
                listed += [folder] if samples is not None else []
                found += samples or []
        alone = [file for file in files if not any(file.is_relative_to(folder) for folder in listed)]
        named = sorted((str(file.relative_to(self.path)), file) for file in alone)
        return [*found, *((name, file, partial(self._beside, file)) for name, file in named)]

    def _folders(self) -> list[Path]:
        """The folder and all below it that are not hidden, those above before those in them."""
        below = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_dir())
        seen = sorted(path for path in below if not any(part.startswith(".") for part in path.parts))
        return [self.path, *(self.path / path for path in seen)]

    def _listed(self, tables: list[Path], skipped: Skipped) -> list[Found] | None:
        """The samples of the first table that names pictures; None where there is none."""
        samples: list[Found] | None = None
        for table in tables:
            name, place = str(table.relative_to(self.path)), table.parent
            try:
                rows = read_rows(table)
            except UserError as error:
                if len(tables) == 1 or table == self.table:
                    raise
                skipped.add(name, BadSample("unreadable table", str(error)))
                continue
            if not any(column(row.content, self.columns) for row in rows):
                detail = f"no column names pictures ({', '.join(columns(rows)[:20]) or 'it has none'})"
                skipped.add(name, BadSample("unknown table", f"{detail}; call it {self.columns[0]}"))
            elif samples is not None:
                skipped.add(name, BadSample("second table", "another one of this folder is used"))
            else:
                samples = [sample for row in rows for sample in self._sample(row, name, place, skipped)]
        return samples

    def _sample(self, row: Row, table: str, place: Path, skipped: Skipped) -> Iterator[Found]:
        """The sample of a row; none of a bad one."""
        name = column(row.content, self.columns)
        file = row.content[name] if name is not None else None
        if isinstance(file, str) and file.strip() and is_text(file):
            picture = place / file
            shown = str(picture.relative_to(self.path)) if picture.is_relative_to(self.path) else file
            yield shown, picture, partial(caption_of, row.content, self.column)
        else:
            lacks = f"it has no {self.columns[0]}"
            why = row.error or (lacks if name is None else f"{name} must be a text, without a NUL")
            skipped.add(f"{table}:{row.number}", BadSample("bad caption line", why))

    def _beside(self, picture: Path) -> str:
        """The caption in the file of the picture's name."""
        path = next((file for suffix in CAPTIONS if (file := picture.with_suffix(suffix)).is_file()), None)
        if path is None:
            raise BadSample("no caption", f"there is no {picture.stem}{', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}")
        try:
            text = read_text(path, MAX_CAPTION_BYTES)
            return caption_of(parse_json(text), self.column) if path.suffix == ".json" else text_of(text)
        except ValueError as error:
            raise BadSample("unreadable caption", str(error)) from None


def _tables(folder: Path) -> list[Path]:
    """Files of a folder that may list pictures, ``metadata`` first; what stands beside a picture is its caption."""
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    stems = {file.stem for file in files if file.suffix.lower() not in (*SUFFIXES, *CAPTIONS)}
    tables = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file() and file.stem not in stems]
    return sorted(tables, key=lambda file: (file.stem != "metadata", SUFFIXES.index(file.suffix.lower()), file.name))
