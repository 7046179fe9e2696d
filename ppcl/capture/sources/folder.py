"""A folder of pictures: captions in ``metadata.jsonl``, or ``name.txt`` beside ``name.png``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ppcl.capture.sources.base import BadSample, Entry, Skipped, Source, decode, shuffled, text_of
from ppcl.common.pictures import picture_files
from ppcl.config import CaptureConfig
from ppcl.errors import UserError

LISTING = "metadata.jsonl"


class Folder(Source):
    """Pictures as files.

    With ``metadata.jsonl`` (the form of Hugging Face's imagefolder) its lines are the samples:
    ``{"file_name": "0001.png", "text": "a red cat"}``. Without one, all pictures below the folder are.

    Args:
        path: The folder.
        settings: ``caption_column`` names the caption in ``metadata.jsonl``.
    """

    def __init__(self, path: Path, settings: CaptureConfig) -> None:
        self.path, self.column = path, settings.caption_column

    def entries(self, seed: int, skipped: Skipped) -> Iterator[Entry]:
        """See :meth:`Source.entries`."""
        listing = self.path / LISTING
        found = self._listed(listing, skipped) if listing.is_file() else self._paired()
        for index in shuffled(len(found), seed):
            name, text = found[index]
            caption = partial(text_of, text) if text is not None else partial(_beside, self.path / name)
            yield Entry(name, caption, partial(decode, self.path / name))

    def _listed(self, listing: Path, skipped: Skipped) -> list[tuple[str, str | None]]:
        """File names and captions of the good lines."""
        try:
            lines = listing.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{listing} cannot be read: {error.strerror or error}; check its permissions") from None
        found: list[tuple[str, str | None]] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                name, text = row["file_name"], row.get(self.column)
                if not isinstance(name, str) or not isinstance(text, str | None):
                    raise TypeError(f"file_name and {self.column} must be texts")
            except KeyError:
                skipped.add(f"{LISTING}:{number}", BadSample("bad caption line", "it has no file_name"))
            except (ValueError, TypeError, AttributeError) as error:
                skipped.add(f"{LISTING}:{number}", BadSample("bad caption line", str(error)))
            else:
                found.append((name, text or ""))  # no caption is an empty one: there is no file beside to look for
        return found

    def _paired(self) -> list[tuple[str, str | None]]:
        """All pictures below the folder."""
        return [(str(file.relative_to(self.path)), None) for file in picture_files(self.path)]


def _beside(picture: Path) -> str:
    """The caption in the text file of the picture's name."""
    path = picture.with_suffix(".txt")
    try:
        return text_of(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadSample("no caption", f"there is no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadSample("unreadable caption", str(error)) from None
