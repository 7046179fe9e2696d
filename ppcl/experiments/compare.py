"""Several plans under one budget and the same training, in one table.

Every row of depth alone removes as many blocks as the optimal plan of depth alone (where its
criterion offers that number) and chooses the starts of its substitutes by the same rule. Where
smaller modules were measured, the first row is what ``ppcl compress`` makes of them: the optimal
plan over depth and width that is predicted to be as fast. All are trained with the same steps,
batches and seeds, and draw with the same picture seeds. The teacher stands in the same table with the
spread of its own seeds. What may be ranked is said by :mod:`ppcl.experiments.noise`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ppcl.analysis.artifacts import Analysis
from ppcl.common.tables import number
from ppcl.config import DistillConfig
from ppcl.config.memory import UNTRAINED
from ppcl.experiments.baselines import BASELINES, OURS, plans_of_equal_size, removed_outright, with_starts, with_width
from ppcl.experiments.noise import READING, is_alike
from ppcl.experiments.runner import MEASURES, Results, Row, RowRunner
from ppcl.experiments.tables import as_json, finish, measured_with, row_cells, table, teacher_cells
from ppcl.pruning.artifacts import Candidates
from ppcl.run import Session
from ppcl.student.plan import CompressionPlan

COLUMNS = ("removed", "params", "share", "speedup", "before", "velocity_error", *MEASURES)


def plan_rows(session: Session) -> tuple[list[Row], list[str]]:
    """The rows of the comparison, and notes about criteria that could not keep to its rules."""
    analysis, candidates = session.read(Analysis, "analysis.json"), session.candidates
    plans, notes = plans_of_equal_size(analysis, candidates, session.config.plan)
    plans = {mode: with_starts(session, plan) for mode, plan in plans.items()}
    same = session.config.distill.model_copy(update={"from_fit": False})
    rows = [*_rows_of_ours(session, analysis, candidates, plans[OURS], same)]
    rows += [Row(mode, BASELINES[mode], plans[mode], same, notes.get(mode)) for mode in BASELINES if mode in plans]
    left_out = [note for mode, note in notes.items() if mode not in plans]
    return [*rows, *_removal_rows(plans, same)], left_out


def _rows_of_ours(
    session: Session, analysis: Analysis, candidates: Candidates, depth: CompressionPlan, settings: DistillConfig
) -> list[Row]:
    """What the method offers: with smaller modules, where any were measured, and of depth alone."""
    none = settings.model_copy(update=UNTRAINED)
    fast = with_width(analysis, candidates, session.config.plan, "speedup", depth)
    small = with_width(analysis, candidates, session.config.plan, "keep", depth)
    if fast is None or small is None:
        return [Row("ours", "ours", depth, settings), Row("ours-undistilled", "ours, undistilled", depth, none)]
    fast, small = with_starts(session, fast), with_starts(session, small)
    note = (
        "ours may use smaller modules, as `ppcl compress` does, and is predicted to be as fast as the rows of depth "
        "alone; ours, of equal size is allowed their parameters instead"
    )
    return [
        Row("ours", "ours", fast, settings, note),
        Row("ours-undistilled", "ours, undistilled", fast, none),
        Row("ours-size", "ours, of equal size", small, settings),
        Row("ours-depth", "ours, depth alone", depth, settings),
        Row("ours-depth-undistilled", "ours, depth alone, undistilled", depth, none),
    ]


def _removal_rows(plans: Mapping[str, CompressionPlan], settings: DistillConfig) -> list[Row]:
    """Blocks removed as most of the literature does it: nothing stands for them, and all steps tune what is left."""
    steps = settings.local_steps + settings.alternating_steps + settings.output_steps
    tuned = settings.model_copy(update={**UNTRAINED, "output_steps": steps})
    note = f"the rows without substitutes have all their {steps} steps in the output stage"
    return [
        Row(f"{mode}-removed", f"{BASELINES[mode]}, no substitutes", removed_outright(plans[mode]), tuned, note)
        for mode in ("uniform", "influence")
        if mode in plans
    ]


def compare_plans(session: Session, place: Path | None = None, seeds: Sequence[int] | None = None) -> str:
    """Compare the optimal plan with the paper's, uniform and block influence; resumable.

    Writes ``RUN/compare/<row>/seed-<s>`` (bundle, pictures, metrics.json) and ``RUN/compare/table.md|json``.

    Args:
        session: Of a run whose fit stage is done.
        place: A further place for the Markdown table.
        seeds: Training seeds; the run's own if None.

    Returns:
        The Markdown text.

    Raises:
        UserError: The budget cannot be met, or an artifact is damaged.
    """
    runner = RowRunner(session)
    training_seeds = tuple(seeds or (session.config.seed,))
    rows, left_out = plan_rows(runner.session)
    results = runner.run_all(rows, training_seeds)
    parts = _paragraphs(runner, results, left_out, training_seeds)
    return finish(session, "table", parts, as_json(runner, results), place)


def _paragraphs(
    runner: RowRunner, results: Results, left_out: Sequence[str], training_seeds: Sequence[int]
) -> list[str]:
    """The comparison in words: table, how to read it, notes, what comes out."""
    settings, model = runner.session.config.distill, results[0][0].plan.model
    ours = results[0][1]
    lines = {"teacher": teacher_cells(model.params, runner.teacher_scores)}
    for row, metrics in results:
        cells = row_cells(row.plan, metrics)
        for name in MEASURES if metrics is not ours else ():
            cells[name] += " ~" if is_alike(ours, metrics, name) else ""
        lines[row.label] = cells
    notes = [*dict.fromkeys(row.note for row, _ in results if row.note), *left_out]
    reading = (
        f"Every trained row has {settings.local_steps} local, {settings.alternating_steps} alternating and "
        f"{settings.output_steps} output steps of {settings.batch_size} states, the same training seeds "
        f"({', '.join(map(str, training_seeds))}), and the same rule for the starts of its substitutes, if it has any. "
        f"{measured_with(runner)} {READING} `~`: not told apart from ours."
    )
    listed = "\n".join(f"* {note}." for note in notes)
    return ["# Plans compared under one budget", table(COLUMNS, lines), reading, listed, conclusion(results)]


def conclusion(results: Results) -> str:
    """What comes out, in words computed from velocity errors and drops after training."""
    lines = []
    for measure, what, unit in (("velocity_error", "Velocity error", ""), ("average_drop", "Average drop", "%")):
        values = {row.name: [m[measure] for m in metrics if m[measure] is not None] for row, metrics in results}
        after = {name: statistics.fmean(numbers) for name, numbers in values.items() if numbers}
        others = [row for row, _ in results if row.is_trained and not row.name.startswith("ours") and row.name in after]
        if "ours" in after:
            ours = next(metrics for row, metrics in results if row.name == "ours")
            tied = {row.name for row, metrics in results if is_alike(ours, metrics, measure)}
            parts = [
                f"{number(after[row.name])}{unit} for {row.label}{' (not told apart)' if row.name in tied else ''}"
                for row in others
            ]
            lines.append(
                f"{what} after training: {number(after['ours'])}{unit} for ours; {'; '.join(parts) or 'no other plan'}."
            )
    return " ".join(lines)
