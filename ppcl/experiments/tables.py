"""The table of an experiment: the teacher, then one line a row, every number with what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import to_jsonable
from ppcl.common.files import write_json, write_text
from ppcl.common.tables import markdown_table, number, provenance, spread
from ppcl.experiments.baselines import removed_blocks, run_keys
from ppcl.experiments.noise import cell, without_items
from ppcl.experiments.runner import MEASURES, Results, RowRunner, Scores
from ppcl.run import Session
from ppcl.student.plan import CompressionPlan

COLUMNS = {
    "removed": "blocks removed",
    "params": "parameters",
    "share": "share",
    "speedup": "speed-up (predicted)",
    "before": "velocity error before training",
    "predicted": "velocity error, predicted",
    "velocity_error": "velocity error",
    "fid": "FID",
    "clip_score": "CLIP score",
    "retrieval_at_1": "retrieval@1",
    "retrieval_at_5": "retrieval@5",
    "average_drop": "average drop, %",
}


def row_cells(plan: CompressionPlan, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every column of a row.

    Args:
        plan: The row's.
        metrics: Its numbers, one mapping a training seed.
    """
    params = metrics[0]["params"]
    return {
        "removed": str(removed_blocks(run_keys(plan))),
        "params": f"{params:,}",
        "share": f"{params / plan.model.params:.1%}",
        "speedup": f"{plan.predicted.speedup:.2f}",
        "before": number(metrics[0].get("velocity_error_before")),
        "predicted": number(plan.predicted.error),
        **{name: cell(metrics, name) for name in ("velocity_error", *MEASURES)},
    }


def teacher_cells(params: int, seeds: Sequence[Scores]) -> dict[str, str]:
    """Every column of the teacher's row: mean ± standard deviation over its seeds of pictures."""
    nothing = {"removed": "0", "before": "0", "predicted": "0", "velocity_error": "0"}
    size = {"params": f"{params:,}", "share": "100%", "speedup": "1.00"}
    return {**nothing, **size, **{name: spread([seed[name] for seed in seeds]) for name in MEASURES}}


def table(columns: Sequence[str], lines: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown of some columns.

    Args:
        columns: Names in ``COLUMNS``.
        lines: Cells by column, by the label of the line.
    """
    header = ["", *(COLUMNS[name] for name in columns)]
    return markdown_table(header, [[label, *(cells[name] for name in columns)] for label, cells in lines.items()])


def measured_with(runner: RowRunner) -> str:
    """Prompts, features and the teacher's row in words."""
    about = runner.summary()
    return (
        f"{len(runner.session.evaluation_prompts)} prompts, features: {about['features']}, FID against "
        f"{about['fid_reference']}; the teacher's row is the mean ± standard deviation over {len(about['seeds'])} "
        "seeds of pictures, and the drop is against that mean. Velocity errors are relative, on held-out states."
    )


def finish(session: Session, name: str, parts: Sequence[str], data: Mapping[str, Any], place: Path | None) -> str:
    """Write a table as Markdown and JSON into the run, and where the user asked for it.

    Args:
        session: Of the run.
        name: ``RUN/compare/<name>.md|json``.
        parts: Paragraphs; empty ones are left out.
        data: What stands behind them.
        place: A further place for the Markdown.

    Returns:
        The Markdown text.
    """
    text = "\n\n".join([*filter(None, parts), provenance(session.command, str(session.device))]) + "\n"
    write_json(session.out / "compare" / f"{name}.json", to_jsonable(dict(data)))
    for path in filter(None, (session.out / "compare" / f"{name}.md", place)):
        write_text(path, text)
    return text


def as_json(runner: RowRunner, results: Results) -> dict[str, Any]:
    """The numbers of a table: the teacher's, and plan and seeds of each row."""
    rows = {
        row.name: {"plan": to_jsonable(row.plan.stacks), "seeds": without_items(metrics)} for row, metrics in results
    }
    return {"teacher": runner.summary(), "rows": rows}
