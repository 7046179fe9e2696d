"""Hugging Face datasets: saved folders, parquet files, and data sets of the hub (needs the ``datasets`` package)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl.capture.sources.base import (
    BadSample,
    Entry,
    Skipped,
    Source,
    caption_column,
    caption_of,
    decode,
    shuffled,
)
from ppcl.capture.sources.shards import expand
from ppcl.common.optional import optional_module
from ppcl.common.pictures import as_seen
from ppcl.config import CaptureConfig
from ppcl.errors import UserError, nearest

logger = logging.getLogger(__name__)
BUFFER = 1000  # rows that a stream is shuffled among


def _library() -> Any:
    return optional_module("datasets", "capture.data", "data")


class Table(Source):
    """Rows with a picture and a caption.

    Args:
        name: What the user gave.
        settings: Names of the columns and of the split.
        load: Returns a ``Dataset``, an ``IterableDataset``, or a dict of them by split.

    Raises:
        UserError: The ``datasets`` package is missing.
    """

    is_here = True  # whether its rows may name files of this machine

    def __init__(self, name: str, settings: CaptureConfig, load: Callable[[Any], Any]) -> None:
        self.name, self.settings, self.library, self._load = name, settings, _library(), load

    def entries(self, seed: int, skipped: Skipped) -> Iterator[Entry]:
        """See :meth:`Source.entries`; a stream is shuffled among 1000 rows at a time."""
        table = self._open()
        if hasattr(table, "__len__"):
            for index in shuffled(len(table), seed):
                yield self._entry(f"row {index}", partial(_row, table, index))
            return
        rows = iter(table.shuffle(seed=seed, buffer_size=BUFFER))
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever parquet or the network raise: what was read before stays usable
                skipped.add(self.name, BadSample("unreadable rest of the data set", _first_line(error)))
                return
            yield self._entry(f"sample {number} of the stream", partial(dict, row))
            number += 1

    def _open(self) -> Any:
        """Load the table with pictures as bytes, not decoded: one that is damaged is then one sample's matter."""
        try:
            table = self._load(self.library)
        except Exception as error:  # ``datasets`` has no error of its own for names, splits, files and networks
            raise UserError(
                f"data set {self.name} cannot be read ({_first_line(error)}); check the name, capture.data_split and "
                "the network"
            ) from None
        if isinstance(table, dict):
            split = self.settings.data_split
            if split not in table:
                raise UserError(
                    f"data set {self.name} has no split {split!r}; set capture.data_split to one of {[*table]}"
                )
            table = table[split]
        names = table.column_names
        for key in ("source_column" if self.settings.source_column else "image_column", "caption_column"):
            wanted = getattr(self.settings, key)
            is_there = names is None or wanted in names
            if not is_there and not (key == "caption_column" and caption_column(dict.fromkeys(names), wanted)):
                hint = nearest(wanted, names)
                raise UserError(
                    f"data set {self.name} has no column {wanted!r}{hint}; set capture.{key} to one of {names}"
                )
        column = self.settings.source_column or self.settings.image_column
        if isinstance((table.features or {}).get(column), self.library.Image):
            table = table.cast_column(column, self.library.Image(decode=False))
        return table

    def _entry(self, name: str, row: Callable[[], dict[str, Any]]) -> Entry:
        image, text = self.settings.source_column or self.settings.image_column, self.settings.caption_column
        return Entry(name, lambda: caption_of(row(), text), lambda: _picture(row().get(image), self.is_here))


def _row(table: Any, index: int) -> dict[str, Any]:
    try:
        return dict(table[index])
    except Exception as error:  # a damaged part of an Arrow file; see above
        raise BadSample("unreadable row", _first_line(error)) from None


def _picture(value: Any, is_here: bool = True) -> Image.Image:
    """The picture of a row: bytes, a path, both in a mapping, or a decoded picture; a path where files are here."""
    if isinstance(value, Image.Image):
        return as_seen(value)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and is_here:
        value = Path(value)
    if not isinstance(value, bytes | Path):
        raise BadSample("missing picture", f"got {type(value).__name__}")
    return decode(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class Hub(Table):
    """A data set of the Hugging Face hub, streamed.

    Args:
        name: ``owner/name``.
        settings: Names of the columns and of the split.
    """

    is_here = False

    def __init__(self, name: str, settings: CaptureConfig) -> None:
        super().__init__(
            name, settings, lambda library: library.load_dataset(name, split=settings.data_split, streaming=True)
        )


class Saved(Table):
    """A folder that ``Dataset.save_to_disk`` wrote.

    Args:
        path: The folder.
        settings: Names of the columns, and of the split if there are several.
    """

    def __init__(self, path: Path, settings: CaptureConfig) -> None:
        super().__init__(str(path), settings, lambda library: library.load_from_disk(str(path)))


class Parquet(Table):
    """Parquet files, streamed.

    Args:
        pattern: Paths with ``{000..012}`` or wildcards.
        settings: Names of the columns.

    Raises:
        UserError: There is no such file.
    """

    def __init__(self, pattern: str, settings: CaptureConfig) -> None:
        names = expand(str(Path(pattern).expanduser()))
        self.missing = [name for name in names if not Path(name).is_file()]
        files = [name for name in names if Path(name).is_file()]
        if not files:
            raise UserError(f"capture.data = {pattern!r}: there is no such file; check the path and the numbers")
        super().__init__(
            pattern,
            settings,
            lambda library: library.load_dataset("parquet", data_files=files, split="train", streaming=True),
        )

    def entries(self, seed: int, skipped: Skipped) -> Iterator[Entry]:
        """See :meth:`Source.entries`."""
        for name in self.missing:
            skipped.add(Path(name).name, BadSample("missing shard"))
        yield from super().entries(seed, skipped)
