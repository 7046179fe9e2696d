"""The report's table of times: transformer alone and whole pictures, several step counts and batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppcl.eval.report_data import pick
from ppcl.eval.report_html import TIMES, number, paragraph, ranged, size_bytes, table, text

Row = Mapping[str, object]


def _rows(value: object) -> list[Row]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _work(row: Row) -> tuple[object, object, object]:
    return row.get("part"), row.get("num_inference_steps"), row.get("batch_size")


def speed_table(labels: Sequence[str], speed: Sequence[object]) -> str:
    """Times of one or many models, one line a kind of work; empty where they are missing or of different work.

    Args:
        labels: The models; the first is what the others are compared with.
        speed: For each model its rows as ``metrics.json`` holds them.
    """
    models = [_rows(rows) for rows in speed]
    if not models or not models[0] or len({tuple(map(_work, rows)) for rows in models}) > 1:
        return ""
    lines = []
    for same in zip(*models, strict=True):
        part, steps, size = _work(same[0])
        name = "transformer call" if part == "transformer" else f"pictures, {steps} steps"
        cells = []
        for position, row in enumerate(same):
            median, low, high = (pick(row, key) for key in ("latency_ms", "latency_p10_ms", "latency_p90_ms"))
            around = (low, high) if low is not None and high is not None else None
            cells.append(ranged(number(median), around))
            if position:
                faster = pick(row, "times_as_fast")
                cells.append(f"{number(faster)}{TIMES}" if faster is not None else number(None))
        lines.append([text(name), text(size), *cells, *(size_bytes(pick(row, "peak_memory_bytes")) for row in same)])
    labels = [text(label) for label in labels]
    header = ["", "prompts at once", f"{labels[0]}, ms"]
    for label in labels[1:]:
        header += [f"{label}, ms", "as fast"]
    header += [f"{label}, peak memory" for label in labels]
    counted = sorted({f"{pick(r, 'runs'):.0f}" for rows in models for r in rows if pick(r, "runs") is not None})
    guide = (
        f"Median of {' or '.join(counted) or 'several'} runs after a warm-up; small: 10th to 90th percentile. As fast: "
        "timed in turn with the first model, whatever else the machine did. Pictures are from prompt to pixels; peak "
        "memory is weights plus what the work adds."
    )
    return f'<div class="times">{table(header, lines)}</div>' + paragraph(text(guide), "soft small")
