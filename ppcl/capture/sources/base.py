"""What every source of captioned pictures has in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ppcl.common.files import write_text
from ppcl.common.outside import is_text, printable
from ppcl.common.pictures import BadPicture, open_picture
from ppcl.common.rows import WORDS, column
from ppcl.common.streams import Stream, step_generator

MAX_CAPTION = 2**16  # characters
MAX_CAPTION_BYTES = 2**20  # of a file that holds one, with whatever stands beside it
CAPTIONS = (".txt", ".caption", ".json")  # beside a picture; the first that is there counts


class BadSample(Exception):
    """A sample that cannot be used.

    Args:
        reason: A few words, the same for all samples of this kind; they are counted by it.
        detail: What is particular about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Entry:
    """One sample that a source lists; nothing of it is read yet.

    Attributes:
        name: A file, or a shard and a key in it, or a row.
        caption: Reads the caption; may raise :class:`BadSample`.
        picture: Reads the picture, RGB, upright; may raise :class:`BadSample`.
    """

    name: str
    caption: Callable[[], str]
    picture: Callable[[], Image.Image]


@dataclass
class Skipped:
    """What was left out, and why."""

    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, bad: BadSample) -> None:
        """Count a sample, a shard or a line of a file."""
        row = {"name": name, "reason": bad.reason, "detail": bad.detail}
        self.rows.append({key: printable(text) for key, text in row.items()})

    def __str__(self) -> str:
        counts = Counter(row["reason"] for row in self.rows)
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))

    @property
    def example(self) -> str:
        """The first detail, for a message that ends a run."""
        row = next((row for row in self.rows if row["detail"]), None)
        return f"; {row['name']}: {row['detail']}" if row else ""

    def save(self, path: Path) -> None:
        """Write one JSON line for each.

        Raises:
            UserError: The file cannot be written.
        """
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))


class Source(ABC):
    """A place that captioned pictures come from."""

    @abstractmethod
    def entries(self, seed: int, skipped: Skipped) -> Iterator[Entry]:
        """List the samples in an order that ``seed`` alone decides.

        Args:
            seed: Of the order.
            skipped: Receives what cannot even be listed: a missing shard, a bad line.

        Raises:
            UserError: The place as a whole cannot be read.
        """


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in an order that the seed decides."""
    return [int(i) for i in torch.randperm(count, generator=step_generator(seed, 0, Stream.SAMPLE_ORDER))]


def text_of(value: Any) -> str:
    """A caption without the white space around it; of several the first.

    Raises:
        BadSample: It is empty, no text, or none that can be tokenized.
    """
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, str):
        raise BadSample("no caption", f"got {type(value).__name__}")
    if not value.strip():
        raise BadSample("empty caption")
    if len(value) > MAX_CAPTION:
        raise BadSample("too long caption", f"{len(value):,} characters")
    if not is_text(value):
        raise BadSample("unusable caption", "it has a NUL or half of a surrogate pair")
    return value.strip()


def caption_column(row: Any, wanted: str) -> str | None:
    """Which column of a row is its caption: the wanted one; without a wish (``text``) one of the usual names."""
    return column(row, [wanted, *(WORDS if wanted == WORDS[0] else ())])


def caption_of(row: Any, wanted: str) -> str:
    """The caption of a row.

    Args:
        row: A mapping.
        wanted: ``capture.caption_column``.

    Raises:
        BadSample: It has none.
    """
    name = caption_column(row, wanted)
    if name is None:
        there = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise BadSample("no caption", f"there is no {wanted} (but {there}); set capture.caption_column")
    return text_of(row[name])


def decode(content: Path | bytes) -> Image.Image:
    """Read a picture; see :mod:`ppcl.common.pictures`.

    Raises:
        BadSample: It is missing, damaged, too large, or no picture.
    """
    try:
        return open_picture(content)
    except BadPicture as bad:
        raise BadSample(bad.reason, bad.detail) from None
