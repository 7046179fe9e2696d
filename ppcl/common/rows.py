"""Rows of text files that people keep prompts and captions in: JSON lines, JSON, CSV, TSV. No torch.

A row is a mapping from columns, or a text where the file has none. Column names are compared without regard to case.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ppcl.common.outside import read_regular
from ppcl.common.reading import parse_json
from ppcl.errors import UserError, shortened

MAX_BYTES = 2**29  # of a file
MAX_LINE = 2**20  # bytes of a line of JSON
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
# what data sets and benchmarks call the words; the first that a row has counts
WORDS = ("text", "caption", "captions", "prompt", "prompts", "description", "sentences")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: Of its line, or of the entry.
        content: A mapping or a text; None where it cannot be read.
        error: Why it cannot.
    """

    number: int
    content: Any
    error: str = ""


def _content(path: Path, limit: int) -> bytes:
    """The content of a text file as UTF-8, without a mark at its start, which UTF-16 must have.

    Raises:
        UserError: It is not there, not readable, no regular file, or larger than so many bytes.
    """
    try:
        content = read_regular(path, limit)
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16").encode() if is_wide else content.removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check its name") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check it") from None


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Read a text file of so many bytes at most: UTF-8, with a mark at its start or without, or UTF-16 with one.

    Raises:
        UserError: It is not there, not readable, or holds something else.
    """
    try:
        return _content(path, limit).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); save it as such") from None


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file whose suffix is one of ``SUFFIXES``; a row that is damaged says so itself.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        return [Row(number, entry) for number, entry in enumerate(_entries(path, read_text(path)), start=1)]
    if kind in (".csv", ".tsv"):
        text = read_text(path)
        return _table(path, text, "\t" if kind == ".tsv" else _delimiter(text))
    return json_lines(_content(path, MAX_BYTES))


def json_lines(content: bytes) -> list[Row]:
    """One JSON value a line; only a line feed ends one."""
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError(f"it has more than {MAX_LINE:,} bytes")
            rows.append(Row(number, parse_json(line)))
        except ValueError as error:
            rows.append(Row(number, None, shortened(error)))
    return rows


def _entries(path: Path, text: str) -> list[Any]:
    """The entries of a JSON file: a list, or the values or the one list of rows in a mapping."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); mend it") from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        worded = [rows for rows in lists if any(isinstance(row, str) or column(row, WORDS) for row in rows)]
        named = [{"file_name": key, **value} if isinstance(value, dict) else value for key, value in found.items()]
        found = (worded or lists or [named])[0]
    if not isinstance(found, list):
        raise UserError(f"{path} holds a {type(found).__name__}; a list of texts or of objects is expected")
    return found


def _delimiter(text: str) -> str:
    """What stands between the columns of a CSV file, by its first line: some programs write ``;`` or a tab."""
    header = text.partition("\n")[0]
    return next((mark for mark in (",", ";", "\t") if mark in header), ",")


def _table(path: Path, text: str, delimiter: str) -> list[Row]:
    """The rows of a table whose first line names its columns."""
    try:
        return _parsed(text, delimiter)
    except csv.Error as error:
        if delimiter != "\t":
            raise UserError(f"{path} is no table ({error}); put texts with quotes or line ends into quotes") from None
        return _parsed(text, delimiter, has_quotes=False)  # to some programs they are characters like others


def _parsed(text: str, delimiter: str, has_quotes: bool = True) -> list[Row]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    names = [name.strip() for name in next(reader, [])]
    rows = []
    for fields in reader:
        if not any(field.strip() for field in fields):
            continue
        error = f"{len(fields)} fields in {len(names)} columns" if len(fields) > len(names) else ""
        rows.append(Row(reader.line_num, None if error else dict(zip(names, fields, strict=False)), error))
    return rows


def column(row: Any, wanted: Sequence[str]) -> str | None:
    """The name of the first of the wanted columns that a row has; None for a row without columns."""
    if not isinstance(row, Mapping):
        return None
    by_name = {str(name).strip().lower(): name for name in row}
    return next((by_name[name.lower()] for name in wanted if name.lower() in by_name), None)


def columns(rows: Iterable[Row]) -> list[str]:
    """All columns of some rows, for messages."""
    return list(dict.fromkeys(str(name) for row in rows if isinstance(row.content, Mapping) for name in row.content))
