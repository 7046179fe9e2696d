"""Prompts for calibration and evaluation; the two never overlap."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppcl.errors import UserError

UNBOUNDED = 1_000_000  # tokens; tokenizers without a limit say 10^30
BUILT_IN = Path(__file__).resolve().parents[1] / "assets" / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line (blank lines are skipped), or a JSON list of texts from a ``.json`` file.

    Only a line feed ends a line, so prompts may hold any other character; in JSON that one too.

    Raises:
        UserError: The file cannot be read or holds fewer than four different prompts.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in (_from_json(path, text) if path.suffix == ".json" else text.split("\n"))]
    except FileNotFoundError:
        raise UserError(f"prompts file {path} does not exist; give a text file with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts file {path} cannot be read as UTF-8 text ({error})") from None
    prompts = list(dict.fromkeys(line for line in lines if line))
    if len(prompts) < 4:
        raise UserError(
            f"prompts file {path} holds {len(prompts)} different prompts, at least 4 are needed; one a line"
        )
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts file {path} is not JSON ({error}); give a list of texts") from None
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(f"prompts file {path} must hold a JSON list of texts, got something else; mend it")
    return found


def split_evaluation(prompts: list[str], count: int) -> tuple[list[str], list[str]]:
    """Split into (calibration, evaluation): evenly spaced prompts, at most a third, are kept for evaluation."""
    count = max(2, min(count, len(prompts) // 3)) if len(prompts) >= 6 else 2
    stride = len(prompts) / count
    chosen = {int(i * stride) for i in range(count)}
    calibration = [text for i, text in enumerate(prompts) if i not in chosen]
    return calibration, [prompts[i] for i in sorted(chosen)]


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


def reach(pipeline: Any) -> tuple[Any, int] | None:
    """The tokenizer of a pipeline that reads most of a text, and how many tokens that is; None if nothing says it."""
    parameter = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    asked = parameter.default if parameter is not None and isinstance(parameter.default, int) else None
    reaches = []
    for name, part in getattr(pipeline, "components", {}).items():
        if name.startswith("tokenizer") and callable(part):
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
