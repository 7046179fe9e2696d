"""The comparison of plans as Markdown: table, how to read it, what comes out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppcl.common.tables import INTERVALS, markdown_table, measured, number, provenance
from ppcl.config import DistillConfig
from ppcl.eval.scoring import SCORES
from ppcl.experiments.baselines import removed_blocks, run_keys
from ppcl.student.plan import CompressionPlan

if TYPE_CHECKING:
    from ppcl.run import Run

MEASURES = ("fid", *SCORES, "average_drop")


@dataclass(frozen=True)
class Row:
    """One row of the comparison.

    Attributes:
        name: Its folder under ``RUN/compare``.
        label: What the table calls it.
        plan: Which blocks stay.
        settings: How the substitutes are trained; zero steps for none.
        note: What a reader must know about it, if anything.
        fitted_by: The run whose fit stage it stands on; the compared one if None.
    """

    name: str
    label: str
    plan: CompressionPlan
    settings: DistillConfig
    note: str | None = None
    fitted_by: Run | None = None

    @property
    def is_trained(self) -> bool:
        """Whether a training seed makes a difference."""
        return bool(self.settings.local_steps or self.settings.alternating_steps or self.settings.output_steps)


def mean_scores(scores: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean of each score over the seeds that have it."""
    result: dict[str, float | None] = {}
    for name in scores[0]:
        known = [value for each in scores if (value := each[name]) is not None]
        result[name] = statistics.fmean(known) if known else None
    return result


Results = Sequence[tuple[Row, Sequence[Mapping[str, Any]]]]


def write_up(
    run: Run, teacher: Mapping[str, Any], results: Results, left_out: Sequence[str], seeds: Sequence[int]
) -> str:
    """The comparison as Markdown: table, how to read it, notes, command."""
    model, settings = results[0][0].plan.model, run.config.distill
    ours = mean_scores([_measures(m) for m in results[0][1]])
    own_spread = {name: _std([s[name] for s in teacher["seeds"]]) for name in MEASURES}
    header = [
        "",
        "blocks removed",
        "parameters",
        "share",
        "speed-up (predicted)",
        "velocity error before training",
        "after",
        "FID",
        "CLIP score",
        "retrieval@1",
        "retrieval@5",
        "average drop, %",
    ]

    def cell(name: str, rows: Sequence[Mapping[str, Any]], compared: bool = True) -> str:
        values: list[float | None] = [row[name] for row in rows]
        mean, mine, std = mean_scores([{name: v} for v in values])[name], ours[name], own_spread[name]
        alike = compared and mean is not None and mine is not None and std is not None and abs(mean - mine) <= 2 * std
        return measured(rows, name) + (" ~" if alike else "")

    own_cells = [cell(n, teacher["seeds"]) for n in MEASURES]
    lines = [["teacher", "0", f"{model.params:,}", "100%", "1.00", "0", "0", *own_cells]]
    for position, (row, metrics) in enumerate(results):
        p = row.plan.predicted
        errors = [number(metrics[0]["velocity_error_before"]), measured(metrics, "velocity_error")]
        scores = [cell(n, metrics, position > 0) for n in MEASURES]
        share = f"{metrics[0]['params'] / model.params:.1%}"
        size = [str(removed_blocks(run_keys(row.plan))), f"{metrics[0]['params']:,}", share, f"{p.speedup:.2f}"]
        lines.append([row.label, *size, *errors, *scores])
    notes = [*dict.fromkeys(row.note for row, _ in results if row.note), *left_out]
    reading = (
        f"Every trained row has {settings.local_steps} local, {settings.alternating_steps} alternating and "
        f"{settings.output_steps} output steps of {settings.batch_size} states, the same training seeds "
        f"({', '.join(map(str, seeds))}), and the same rule for the starts of its substitutes, if it has any. "
        f"{len(run.evaluation_prompts)} prompts, features: {teacher['features']}, FID against "
        f"{teacher['fid_reference']}. The teacher's row is the mean ± standard deviation over "
        f"{len(teacher['seeds'])} seeds of pictures; the drop is against that mean. "
        "`~`: differs from ours by at most twice the teacher's standard deviation; no ranking follows. "
        f"Velocity errors are relative, on held-out states. {INTERVALS} Over several training seeds: mean ± standard "
        "deviation instead."
    )
    return (
        "\n\n".join(
            [
                "# Plans compared under one budget",
                markdown_table(header, lines),
                reading,
                *([("\n".join(f"* {note}." for note in notes))] if notes else []),
                conclusion(results),
                provenance(run.command, str(run.device)),
            ]
        )
        + "\n"
    )


def conclusion(results: Results) -> str:
    """What comes out, in words computed from velocity errors and drops after training."""
    lines = []
    for measure, what, unit in (("velocity_error", "Velocity error", ""), ("average_drop", "Average drop", "%")):
        known = {row.name: [m[measure] for m in metrics if m[measure] is not None] for row, metrics in results}
        after = {name: statistics.fmean(values) for name, values in known.items() if values}
        others = [row for row, _ in results if row.is_trained and not row.name.startswith("ours") and row.name in after]
        if "ours" in after:
            parts = [f"{number(after[row.name])}{unit} for {row.label}" for row in others]
            lines.append(
                f"{what} after training: {number(after['ours'])}{unit} for ours; {'; '.join(parts) or 'no other plan'}."
            )
    return " ".join(lines)


def _measures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: metrics[name] for name in MEASURES}


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None
