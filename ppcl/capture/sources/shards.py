"""Shards of webdataset: tar files in which files of one base name are one sample.

A shard is indexed by the headers of its members and read at their offsets, so the order is free and no shard is read
whole. Shards are uncompressed, as webdataset writes them.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ppcl.capture.sources.base import (
    CAPTIONS,
    BadSample,
    Entry,
    Skipped,
    Source,
    caption_of,
    decode,
    shuffled,
    text_of,
)
from ppcl.common.pictures import SUFFIXES
from ppcl.config import CaptureConfig
from ppcl.errors import UserError

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

    def read(self) -> bytes:
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise BadSample("damaged shard", str(error.strerror or error)) from None
        if len(content) < self.size:
            raise BadSample("damaged shard", "it ends inside of this sample")
        return content


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
            yield Entry(name, partial(self._caption, members), partial(_picture, members))

    def _samples(self, shard: Path, skipped: Skipped) -> list[tuple[str, list[_Place]]]:
        """Names and members of a shard's samples; of a damaged shard those before the damage."""
        members: dict[str, list[_Place]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    key, dot, suffix = base.partition(".")  # as webdataset: what follows the first dot is the suffix
                    if member.isfile() and dot:
                        place = _Place(shard, f".{suffix.lower()}", member.offset_data, member.size)
                        members.setdefault(f"{folder}/{key}".lstrip("/"), []).append(place)
            if any(_tail(shard)):  # tarfile takes a header that is cut off for the end
                raise EOFError("it ends without an end mark")
        except (tarfile.TarError, OSError, EOFError) as error:
            skipped.add(shard.name, BadSample("damaged shard", str(error)))
        return [(f"{shard.name}/{key}", places) for key, places in members.items()]

    def _caption(self, members: list[_Place]) -> str:
        for suffix in CAPTIONS:
            place = next((p for p in members if p.suffix == suffix), None)
            if place is None:
                continue
            try:
                text = place.read().decode("utf-8-sig")
                return caption_of(json.loads(text), self.column) if suffix == ".json" else text_of(text)
            except (ValueError, RecursionError) as error:
                raise BadSample("unreadable caption", str(error)) from None
        raise BadSample("no caption", f"the sample has none of {', '.join(CAPTIONS)}")


def _tail(shard: Path, size: int = 1024) -> bytes:
    """The last bytes of a shard: two blocks of zeros where it is whole."""
    with shard.open("rb") as file:
        file.seek(-min(size, shard.stat().st_size), 2)
        return file.read()


def _picture(members: list[_Place]) -> Image.Image:
    for place in members:
        if place.suffix in SUFFIXES:
            return decode(place.read())
    raise BadSample("missing picture", f"the sample has none of {', '.join(SUFFIXES)}")
