"""Shards of webdataset: tar files in which files of one base name are one sample.

A shard is indexed by the headers of its members and read at their offsets, so the order is free and no shard is read
whole. Shards are uncompressed, as webdataset writes them.
"""

from __future__ import annotations

import glob
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

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
from ppcl.common.outside import printable
from ppcl.common.pictures import MAX_BYTES, SUFFIXES
from ppcl.common.reading import parse_json
from ppcl.config import CaptureConfig
from ppcl.errors import UserError

MAX_SHARDS = 1_000_000
MAX_HEADER = 2**20  # bytes: the longest names and their attributes
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(pattern: str) -> list[str]:
    """Write out number ranges (``data-{000..012}.tar``, as a shell does), then wildcards.

    Returns:
        File names, sorted; those of a range whether they are there or not.
    """
    names = [""]
    position = 0
    for match in _RANGE.finditer(pattern):
        first, last = match.groups()
        width = len(first) if first.startswith("0") else 0
        if len(first) > 9 or len(last) > 9 or len(names) * (int(last) - int(first) + 1) > MAX_SHARDS:
            name = printable(pattern)
            raise UserError(f"capture.data = {name!r} stands for more than {MAX_SHARDS:,} files; check it")
        numbers = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
        before = pattern[position : match.start()]
        names = [name + before + number for name in names for number in numbers]
        position = match.end()
    names = [name + pattern[position:] for name in names]
    found = (glob.glob(name, recursive=True) if glob.has_magic(name) else [name] for name in names)  # noqa: PTH207
    return sorted({name for group in found for name in group})


@dataclass(frozen=True)
class _Place:
    """Where a member's bytes are."""

    shard: Path
    suffix: str
    offset: int
    size: int

    def read(self, limit: int) -> bytes:
        if self.size > limit:
            raise BadSample("too large member", f"{self.size:,} bytes, more than {limit:,}")
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise BadSample("damaged shard", str(error.strerror or error)) from None
        if len(content) < self.size:
            raise BadSample("damaged shard", "it ends inside of this sample")
        return content


class _Headers(io.FileIO):
    """A shard as tarfile reads it: headers, never more.

    A header whose size is negative, or larger than any header, would be read as all that is left of the file.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class Shards(Source):
    """Tar files of webdataset.

    Args:
        pattern: Paths with ``{000..012}`` or wildcards.
        settings: ``caption_column`` names the caption in a sample's ``.json``.

    Raises:
        UserError: None of the shards is there.
    """

    def __init__(self, pattern: str, settings: CaptureConfig) -> None:
        self.column = settings.caption_column
        self.suffixes = [f".{settings.source_column}{end}".replace("..", ".") for end in ("", *SUFFIXES)]
        self.suffixes = self.suffixes if settings.source_column else list(SUFFIXES)
        names = [Path(name).expanduser() for name in expand(str(Path(pattern).expanduser()))]
        self.missing = [path for path in names if not path.is_file()]
        self.shards = [path for path in names if path.is_file()]
        if not self.shards:
            raise UserError(f"capture.data = {pattern!r}: there is no such shard; check the path and the numbers")

    def entries(self, seed: int, skipped: Skipped) -> Iterator[Entry]:
        """See :meth:`Source.entries`."""
        for path in self.missing:
            skipped.add(path.name, BadSample("missing shard"))
        found = [sample for path in self.shards for sample in self._samples(path, skipped)]
        for index in shuffled(len(found), seed):
            name, members = found[index]
            yield Entry(name, partial(self._caption, members), partial(_picture, members, self.suffixes))

    def _samples(self, shard: Path, skipped: Skipped) -> list[tuple[str, list[_Place]]]:
        """Names and members of a shard's samples; of a damaged shard those before the damage."""
        members: dict[str, list[_Place]] = {}
        try:
            with _Headers(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.size < 0:  # the next header would be looked for before this one, without end
                        raise tarfile.ReadError(f"a member of {member.size} bytes")
                    folder, _, base = member.name.rpartition("/")
                    key, dot, suffix = base.partition(".")  # as webdataset: what follows the first dot is the suffix
                    if member.isfile() and dot:
                        place = _Place(shard, f".{suffix.lower()}", member.offset_data, member.size)
                        members.setdefault(f"{folder}/{key}".lstrip("/"), []).append(place)
                file.seek(archive.offset)
                end = file.read(tarfile.BLOCKSIZE)  # tarfile takes any header that it cannot read for the end
                if len(end) < tarfile.BLOCKSIZE or any(end):
                    raise EOFError("it ends without an end mark")
        except Exception as error:  # tarfile lets all kinds of errors through on damaged headers
            skipped.add(shard.name, BadSample("damaged shard", str(error) or type(error).__name__))
        return [(f"{shard.name}/{key}", places) for key, places in members.items()]

    def _caption(self, members: list[_Place]) -> str:
        for suffix in CAPTIONS:
            place = next((p for p in members if p.suffix == suffix), None)
            if place is None:
                continue
            try:
                text = place.read(MAX_CAPTION_BYTES).decode("utf-8-sig")
                return caption_of(parse_json(text), self.column) if suffix == ".json" else text_of(text)
            except ValueError as error:
                raise BadSample("unreadable caption", str(error)) from None
        raise BadSample("no caption", f"the sample has none of {', '.join(CAPTIONS)}")


def _picture(members: list[_Place], suffixes: Sequence[str]) -> Image.Image:
    for place in members:
        if place.suffix in suffixes:
            return decode(place.read(MAX_BYTES))
    raise BadSample("missing picture", f"the sample has none of {', '.join(suffixes)}")
