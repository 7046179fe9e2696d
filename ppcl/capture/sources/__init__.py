"""Captioned pictures as calibration data: where they come from, which are usable, what size they get.

Pictures are looked at one by one, in an order that the seed alone decides, until enough usable ones are found, so that
a large data set is never read whole. What cannot be used is left out, counted and listed, and never ends a run as
long as anything is left.
"""

from __future__ import annotations

import glob
from pathlib import Path

from ppcl.capture.sources.base import BadSample, Entry, Skipped, Source, decode
from ppcl.capture.sources.choose import Sample, bucket_sizes, choose_samples, fit_picture, nearest_size
from ppcl.capture.sources.folder import Folder
from ppcl.capture.sources.shards import Shards
from ppcl.capture.sources.tables import Hub, Parquet, Saved
from ppcl.common import rows
from ppcl.common.outside import printable
from ppcl.config import CaptureConfig
from ppcl.errors import UserError

__all__ = [
    "BadSample",
    "Entry",
    "Sample",
    "Skipped",
    "Source",
    "bucket_sizes",
    "choose_samples",
    "decode",
    "fit_picture",
    "nearest_size",
    "open_source",
]


def open_source(settings: CaptureConfig) -> Source:
    """Tell by its name and content what ``capture.data`` is.

    Args:
        settings: ``data`` and the names of columns and split.

    Returns:
        The source; what it lists is read later.

    Raises:
        UserError: There is no such folder, shard or file, or the ``datasets`` package is needed and missing.
    """
    if settings.data.startswith("hub:"):
        return Hub(settings.data.removeprefix("hub:"), settings)
    try:
        return _open_here(settings.data, settings)
    except (OSError, RuntimeError) as error:  # a name longer than any, a folder that is closed, the home of nobody
        reason = getattr(error, "strerror", None) or str(error)
        name = printable(settings.data)[:200]
        raise UserError(f"capture.data = {name!r} cannot be read: {reason}; check it") from None


def _open_here(data: str, settings: CaptureConfig) -> Source:
    """A source on this machine."""
    path = Path(data).expanduser()
    if path.is_dir():
        return _open_folder(path, settings)
    if path.is_file() and path.suffix.lower() in rows.SUFFIXES:
        return Folder(path, settings)
    if data.endswith(".tar"):
        return Shards(data, settings)
    if data.endswith(".parquet"):
        return Parquet(data, settings)
    raise UserError(
        f"capture.data = {printable(data)!r} is not there; give prompts, a folder of captioned pictures, a table of "
        "them, shards like data-{000..012}.tar, *.parquet, or hub:owner/name"
    )


def _open_folder(path: Path, settings: CaptureConfig) -> Source:
    """A folder holds pictures, shards, parquet files, or what ``datasets`` saved."""
    if any((path / f"metadata{suffix}").is_file() for suffix in rows.SUFFIXES):
        return Folder(path, settings)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return Saved(path, settings)
    if next(path.glob("*.tar"), None):
        return Shards(str(Path(glob.escape(str(path))) / "*.tar"), settings)
    if next(path.rglob("*.parquet"), None):
        return Parquet(str(Path(glob.escape(str(path))) / "**" / "*.parquet"), settings)
    return Folder(path, settings)
