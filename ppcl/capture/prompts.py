"""Prompts for calibration and evaluation; the two never overlap."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.common.rows import SUFFIXES, WORDS, Row, column, columns, json_lines, read_rows, read_text
from ppcl.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from ppcl.config import CaptureConfig

logger = logging.getLogger(__name__)
PROMPTS = ("prompt", "prompts", *WORDS)  # columns, the first that is there counts
UNBOUNDED = 1_000_000  # tokens; tokenizers without a limit say 10^30
DRAWN = "sources"  # in a run's calibration folder: pictures to start from that were drawn for it
BUILT_IN = Path(__file__).resolve().parents[1] / "assets" / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """Read prompts: a text file of one a line, or JSON lines, JSON, CSV or TSV with a column of them.

    In a text file only a line feed ends a line, so prompts may hold any other character; in the others that one too. Of
    a folder each ``.txt`` is a prompt.

    Raises:
        UserError: The file cannot be read, has no column of prompts, or holds fewer than four different ones.
    """
    if not path.exists():
        raise UserError(f"prompts file {path} does not exist; give a text file with one prompt a line")
    rows = _rows(path)
    if rows and not any(isinstance(row.content, str) or column(row.content, PROMPTS) for row in rows):
        names = ", ".join(columns(rows)[:20])
        what = f"no column of prompts (it has {names})" if names else f"no prompts ({rows[0].error or 'no texts'})"
        raise UserError(f"prompts file {path} has {what}; call one column prompt, or give a text, one prompt a line")
    texts = [_text(row) for row in rows]
    if bad := [row for row, text in zip(rows, texts, strict=True) if not text]:
        why = bad[0].error or "no prompt"
        logger.warning("prompts file %s: %d rows are left out, the first is %d: %s", path, len(bad), bad[0].number, why)
    prompts = list(dict.fromkeys(text for text in texts if text))
    if len(prompts) < 4:
        raise UserError(
            f"prompts file {path} holds {len(prompts)} different prompts, at least 4 are needed; one a line"
        )
    return prompts


def _rows(path: Path) -> list[Row]:
    """What may be prompts, in the order of the file."""
    if path.is_dir():
        return [Row(number, read_text(file)) for number, file in enumerate(sorted(path.glob("*.txt")), start=1)]
    if path.suffix.lower() in SUFFIXES:
        return read_rows(path)
    if path.suffix.lower() in (".yaml", ".yml", ".parquet", ".xlsx", ".xml"):
        raise UserError(f"prompts file {path} is no text of one prompt a line, nor one of {', '.join(SUFFIXES)}")
    text = read_text(path)
    lines = [Row(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and all(line.content.lstrip().startswith("{") for line in lines):
        rows = json_lines(text.encode())
        return rows if all(isinstance(row.content, dict) for row in rows) else lines
    if remarks := [line.number for line in lines if line.content.startswith("# ")]:
        logger.warning("prompts file %s: lines with # are prompts as others are (line %s)", path, remarks[0])
    return lines


def _text(row: Row) -> str:
    """The prompt of a row, empty where it has none; of several the first."""
    name = column(row.content, PROMPTS)
    value = row.content if name is None else row.content[name]
    if isinstance(value, list) and value:
        value = value[0]
    return value.strip() if isinstance(value, str) else ""


def split_evaluation(prompts: list[str], count: int) -> tuple[list[str], list[str]]:
    """Split into (calibration, evaluation): evenly spaced prompts, at most a third, are kept for evaluation."""
    count = max(2, min(count, len(prompts) // 3)) if len(prompts) >= 6 else 2
    stride = len(prompts) / count
    chosen = {int(i * stride) for i in range(count)}
    calibration = [text for i, text in enumerate(prompts) if i not in chosen]
    return calibration, [prompts[i] for i in sorted(chosen)]


def pictured_prompts(settings: CaptureConfig, count: int, seed: int) -> tuple[Sequence[str], Sequence[str]]:
    """Return (calibration, evaluation) prompts that bring pictures, of a teacher that starts from pictures.

    Args:
        settings: ``data`` and its columns; ``num_prompts`` pictures calibrate at most.
        count: Evaluation prompts wanted; a third of the captions at most, each with one picture.
        seed: Of the order.

    Raises:
        UserError: There is no such data, or fewer than four usable captions.
    """
    from ppcl.capture.sources import Skipped, choose_samples, open_source
    from ppcl.teacher.pipeline_call import PicturedPrompt

    skipped = Skipped()
    samples = choose_samples(open_source(settings), settings.num_prompts + count, [(1, 1)], (), skipped, seed)
    prompts = [PicturedPrompt(s.caption, s.entry.name, partial(_read_picture, s.entry)) for s in samples]
    first = {str(prompt): prompt for prompt in reversed(prompts)}
    texts = list(dict.fromkeys(map(str, prompts)))
    if len(texts) < 4:
        left_out = f"; left out: {skipped}" if skipped.rows else ""
        raise UserError(
            f"capture.data = {settings.data}: {len(prompts)} usable pictures with {len(texts)} different captions, "
            f"at least 4 are needed{left_out}"
        )
    evaluation = split_evaluation(texts, count)[1]
    return [prompt for prompt in prompts if prompt not in set(evaluation)], [first[text] for text in evaluation]


def drawn_data(settings: CaptureConfig, calibration: Path) -> CaptureConfig:
    """The settings that read pictures which were drawn for a run; as they are where there are none, or data."""
    from ppcl.config.sections import PROMPTS as NONE

    folder = calibration / DRAWN
    if settings.data != NONE or not folder.is_dir():
        return settings
    return type(settings).model_validate({"num_prompts": settings.num_prompts, "data": str(folder)})


def _read_picture(entry: Any) -> Image.Image:
    from ppcl.capture.sources import BadSample

    try:
        picture: Image.Image = entry.picture()
    except BadSample as bad:
        raise UserError(f"picture {entry.name} went away while it was used ({bad.reason}); run again") from None
    return picture


def prompts_for(model: str, path: Path | None, count: int) -> tuple[list[str], list[str]]:
    """Return (calibration, evaluation) prompts of a run.

    Args:
        model: ``emoji`` uses the embedded data set: captions that the teacher was trained on to calibrate, pairs of
            emoji and ground that neither teacher nor student have seen together to evaluate.
        path: The user's own file, if any.
        count: Evaluation prompts wanted.
    """
    if path is not None:
        return split_evaluation(read_prompts(path), count)
    if model == "emoji":
        from ppcl.emoji.data import load_pairs

        calibration, evaluation = ([pair.caption for pair in load_pairs(split)] for split in ("train", "new pair"))
        return calibration, evaluation[:count]
    return split_evaluation(read_prompts(BUILT_IN), count)


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """What a pipeline calls its tokenizers, by name; where that is a processor, which reads pictures first, its own."""
    parts = getattr(pipeline, "components", {})
    own = {name: getattr(part, "tokenizer", part) for name, part in parts.items() if name.startswith("tokenizer")}
    return {name: part for name, part in own.items() if callable(part)}


def reach(pipeline: Any) -> tuple[Any, int] | None:
    """The tokenizer of a pipeline that reads most of a text, and how many tokens that is; None if nothing says it."""
    parameter = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    asked = parameter.default if parameter is not None and isinstance(parameter.default, int) else None
    reaches = []
    for part in tokenizers_of(pipeline).values():
        limits = [limit for limit in (asked, getattr(part, "model_max_length", None)) if limit]
        reaches.append((part, min(limits, default=UNBOUNDED)))
    tokenizer, limit = max(reaches, key=lambda pair: pair[1], default=(None, UNBOUNDED))
    return (tokenizer, limit) if limit < UNBOUNDED else None


def cut_note(pipeline: Any, texts: Sequence[str]) -> str | None:
    """What to say where texts are longer than a pipeline reads: their beginnings count, wherever they enter."""
    found = reach(pipeline)
    if found is None:
        return None
    tokenizer, limit = found
    # no tokenizer makes more tokens of a text than it has bytes
    long = [text for text in texts if len(text.encode()) > limit and len(tokenizer(text).input_ids) > limit]
    return of_beginnings(long, len(texts), limit, type(pipeline).__name__) if long else None


def of_beginnings(long: Sequence[str], count: int, limit: int, reader: str) -> str:
    """The sentence of :func:`cut_note`, for any reader of texts."""
    return f"longer than the {limit} tokens that {reader} reads: {len(long)} of {count} texts; their ends do nothing"
