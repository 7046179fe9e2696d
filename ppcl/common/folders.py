"""Whose a folder is: it is claimed by a marker or empty, locked, and what is not of this program is not touched.

No torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl.common.files import LEFTOVER, write_text
from ppcl.common.outside import printable
from ppcl.errors import ArtifactError, UserError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK, HOLDER, LEDGER = ".lock", ".lock.pid", "stages.json"
_LOCKS: dict[str, FileLock] = {}  # of this process
# what stages of a run remove before they make it again
OF_STAGES = ("calibration", "sweep", "checkpoints", "samples", "bundle", "recovered", "pipeline", "eval")
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # files inside of save_file


def check_claim(folder: Path, marker: str, kind: str) -> None:
    """Refuse a folder that is somebody else's: one is ours by the file that marks it, or by being empty.

    Args:
        folder: What was given as ``--out``; it need not exist.
        marker: The file's name.
        kind: What it would be then, for the message.

    Raises:
        ArtifactError: It holds something else, or cannot be read.
    """
    try:
        if (folder / marker).is_file() or not folder.is_dir():
            return
        strange = (p for p in folder.iterdir() if not (_is_of_a_start(p.name, marker) or _is_round(p, marker)))
        strangers = sorted(path.name for path in strange)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror or error}; choose another --out") from error
    if strangers:
        raise ArtifactError(
            f"{folder} is not empty and not {kind} of ppcl (it holds {printable(repr(strangers[0]))}); "
            "choose another --out"
        )


def _is_of_a_start(name: str, marker: str) -> bool:
    """Whether something is left of a process that was killed before it wrote its marker."""
    leftover = LEFTOVER.fullmatch(name)
    return name in (LOCK, HOLDER) or (leftover is not None and leftover["name"] in (HOLDER, marker))


def _is_round(path: Path, marker: str) -> bool:
    """Whether something is an earlier round, or another transformer's run, of a run that has not begun."""
    if marker != LEDGER or not re.fullmatch(r"round-\d+|transformer", path.name) or not path.is_dir():
        return False
    return (path / LEDGER).is_file() or all(_is_of_a_start(inner.name, LEDGER) for inner in path.iterdir())


def check_apart(out: Path, others: Iterable[Path]) -> None:
    """Refuse to write inside of what is read, or of what a stage of a run writes.

    A model's or a data set's folder would become another one, and a stage removes its folder with all that is in it.

    Args:
        out: What was given as ``--out``.
        others: Folders that are read.

    Raises:
        ArtifactError: It lies in one of them.
    """
    real = out.resolve()
    of_runs = (path for path in (real, *real.parents) if path.name in OF_STAGES and (path.parent / LEDGER).is_file())
    if inner := next(of_runs, None):
        raise ArtifactError(f"{out} lies in {inner}, which a stage of the run writes; choose another --out")
    for other in others:
        if out.resolve().is_relative_to(other.resolve()):
            raise ArtifactError(f"{out} lies in {other}, which is read and not written; choose another --out")


def lock_folder(folder: Path) -> FileLock:
    """Keep other processes out of a folder until the lock is released or the process ends in any way.

    The same process may ask again. Its number stands in a file of its own, since opening a lock may empty it.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path, holder, place = folder / LOCK, folder / HOLDER, str(folder.resolve() / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        usual = stat.S_IMODE(path.stat().st_mode)  # by the umask, which filelock of before 3.13 overrules
        lock = _LOCKS.setdefault(place, FileLock(place, mode=usual, thread_local=False))
        lock.acquire(blocking=False)
    except Timeout:
        owner = "unknown"
        with contextlib.suppress(OSError):
            owner = holder.read_text(errors="replace")[:20]
        raise UserError(
            f"{folder} is in use by process {owner}; wait until it is done, or choose another --out"
        ) from None
    except NotImplementedError:  # a file system without locks: go on unprotected rather than not at all
        return lock
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    write_text(holder, str(os.getpid()))
    return lock


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of attempts that were killed; the caller holds the lock.

    Neither links nor other hidden folders are entered: what lies there is not of this program.
    """
    for at, folders, files in os.walk(folder):
        for name in [name for name in folders if LEFTOVER.fullmatch(name)]:
            shutil.rmtree(Path(at) / name, ignore_errors=True)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if LEFTOVER.fullmatch(name) or _OF_SAFETENSORS.fullmatch(name):
                with contextlib.suppress(OSError):
                    (Path(at) / name).unlink(missing_ok=True)
