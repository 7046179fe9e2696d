"""Reading and writing artifacts: atomic, checked, without pickle.

A file is written beside its final name and renamed, so a reader sees the old file or
the new one, never half of one. A folder is published the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ppcl.common.reading import MOST_BYTES, MOST_YAML, parse_json, parse_yaml, read_bytes
from ppcl.errors import ArtifactError, UserError, shortened

if TYPE_CHECKING:
    pass

T = TypeVar("T")
DELETE = "delete it and run again"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    Works for a file and for a folder that the block creates. A folder replaces an older one, a file never does. All
    files follow the user's umask.

    Raises:
        UserError: The place cannot be written (full disk, read-only folder), or a file is to go where a folder is.
    """
    path = Path(path)
    temporary = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _give_usual_modes(temporary)
        if path.is_dir() and not temporary.is_dir():
            raise OSError(errno.EISDIR, "a folder is there")
        if path.is_dir():
            _swap_folder(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --out"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _give_usual_modes(written: Path) -> None:
    """Let a file, or all of a folder, be as readable as the user's umask has new files be.

    Some libraries (safetensors) write through temporary files that only their owner may read.
    """
    probe = written.with_name(f".mode{written.name}")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
    usual = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    for path in [written, *(written.rglob("*") if written.is_dir() else ())]:
        status = path.lstat()
        # a file with another name (export.components=link) is not ours alone
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and stat.S_IMODE(status.st_mode) != usual:
            path.chmod(usual)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside a path, which nobody else gives to what is his."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}.ppcl")


def _swap_folder(new: Path, old: Path) -> None:
    """Replace folder ``old`` by ``new``; a crash in between leaves one of them in place."""
    retired = _beside(old, "old")
    old.rename(retired)
    new.rename(old)
    remove(retired)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link the link, never what it leads to.

    Raises:
        UserError: It cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}; choose another --out") from error


LEFTOVER = re.compile(r"\.(?P<name>.+)\.(tmp|old)-\d+\.ppcl")  # see atomic_path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically, with sorted keys so that equal data give equal bytes."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file, flush=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free some space and run again") from error


def read_json(path: str | Path, error: type[UserError] = ArtifactError, remedy: str = DELETE) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: What is raised; an artifact's unless it is somebody else's file.
        remedy: What to do about a damaged one.

    Raises:
        UserError: The file is missing or damaged, too large or nested too deep, or not a regular file.
    """
    return _parsed(Path(path), parse_json, error, remedy, MOST_BYTES)


def read_mapping(path: str | Path, error: type[UserError] = ArtifactError, remedy: str = DELETE) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; see :func:`read_json`."""
    return _mapping(read_json(path, error, remedy), Path(path), error, remedy)


def read_yaml(path: str | Path, error: type[UserError] = ArtifactError, remedy: str = DELETE) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty one is one, too. See :func:`read_json`."""
    data = _parsed(Path(path), lambda content: parse_yaml(content.decode("utf-8-sig")), error, remedy, MOST_YAML)
    return _mapping({} if data is None else data, Path(path), error, remedy)


def read_text(path: Path, error: type[UserError], remedy: str, most: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8, with a byte order mark or without; see :func:`read_json`."""
    return _parsed(path, lambda content: content.decode("utf-8-sig"), error, remedy, most)


def _parsed(path: Path, parse: Callable[[bytes], T], error: type[UserError], remedy: str, most: int) -> T:
    try:
        return parse(read_bytes(path, most))
    except FileNotFoundError:
        raise error(f"{path} does not exist; {missing_remedy(remedy)}") from None
    except ValueError as reason:  # of Unicode and of JSON, too
        raise error(f"{path} is damaged ({shortened(reason)}); {remedy}") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}; {remedy}") from None


def missing_remedy(remedy: str) -> str:
    """What to do about a file that is not there: it cannot be deleted."""
    return "run the stage that writes it" if remedy == DELETE else remedy


def _mapping(data: Any, path: Path, error: type[UserError], remedy: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise error(f"{path} is damaged (a {type(data).__name__}, not a mapping); {remedy}")
    return data


def digest(*parts: Any) -> str:
    """Return a short SHA-256 of JSON-serialisable parts and of the content of Path parts."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            sha.update(file_digest(part).encode())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of every file of a folder with its relative name."""
    sha = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        sha.update(str(file.relative_to(path)).encode())
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    sha.update(chunk)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from error
    return sha.hexdigest()


def share_folder(source: Path, place: Path) -> None:
    """Make ``place`` a folder of the same files, which nobody changes: links, or copies where there are none."""
    with atomic_path(place) as temporary:
        temporary.mkdir()
        for file in sorted(path for path in source.iterdir() if path.is_file()):
            if not link_file(file, temporary / file.name):
                shutil.copyfile(file, temporary / file.name)


def link_file(source: Path, place: Path) -> bool:
    """Make ``place`` another name of a file: a hard link, which outlives the source folder (and a cleaned cache).

    Returns:
        Whether the file system allowed it.
    """
    try:
        place.hardlink_to(source.resolve())  # files of the hub's cache are links themselves
    except OSError:  # another file system, another owner, or no links at all
        return False
    return True
