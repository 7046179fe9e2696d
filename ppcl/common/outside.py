"""What comes from outside and is no file of ours yet: names that become paths, links, files to open, texts.

A name in an artifact or a data set becomes a path here and nowhere else. No torch.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from ppcl.errors import ArtifactError

_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # no file system and no tokenizer takes these


def is_text(text: str) -> bool:
    """Whether a text can be stored and tokenized: no NUL, no half of a surrogate pair."""
    return _UNUSABLE.search(text) is None


def printable(text: str) -> str:
    """A text as one line that any terminal and any UTF-8 file takes; what it cannot take is written as its number."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def inside(folder: Path, name: object, said_by: str) -> Path:
    """The path of a name that a file says, which must lie in that file's folder.

    Args:
        folder: Where the name is to be found.
        name: A file or folder, with ``/`` between the parts.
        said_by: What says it, for the message.

    Raises:
        ArtifactError: It is no name, or leads out of the folder.
    """
    parts = re.split(r"[/\\]", name) if isinstance(name, str) and is_text(name) else [""]
    if not {"", ".", ".."}.isdisjoint(parts) or ":" in parts[0]:
        raise ArtifactError(
            f"{said_by} names {printable(repr(name))}, which is nothing in its folder; fetch or write it again"
        )
    return folder.joinpath(*parts)


def real_places(folder: Path) -> list[Path]:
    """Where the files of a model's folder really are: in it; those of a snapshot in the hub's cache among its blobs."""
    real = folder.resolve()
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def check_links(entries: Iterable[Path], places: Sequence[Path]) -> None:
    """Refuse links that lead elsewhere: what lies behind them would be copied, and published.

    Args:
        entries: Files and folders that will be copied.
        places: Where links may lead, see :func:`real_places`.

    Raises:
        ArtifactError: There is a link that leads elsewhere.
    """
    for path in (path for entry in entries for path in [entry, *sorted(entry.rglob("*"))]):
        if path.is_symlink() and path.exists() and not any(path.resolve().is_relative_to(place) for place in places):
            raise ArtifactError(
                f"{path} is a link that leads out of its model's folder; put what is meant in its place (cp -rL copies "
                "a folder without links), or remove it"
            )


def open_regular(path: Path, limit: int) -> io.BufferedReader:
    """Open a file for reading, if it is one: a pipe, a device or a file without an end is not waited for.

    Args:
        path: The file; links are followed.
        limit: Bytes that it may have.

    Raises:
        OSError: It is not there, not a regular file, larger, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have its name") from None
    status = os.fstat(descriptor)
    reason = "" if stat.S_ISREG(status.st_mode) else "it is not a regular file"
    if not reason and status.st_size > limit:
        reason = f"it has {status.st_size:,} bytes, more than {limit:,}"
    if reason:
        os.close(descriptor)
        raise OSError(errno.EINVAL, reason)
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a file whole; see :func:`open_regular`."""
    with open_regular(path, limit) as file:
        return file.read(limit)
