"""An evaluation as Markdown: verdicts, notes, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppcl.analysis.artifacts import Analysis
from ppcl.common.tables import counted, number, plain
from ppcl.eval.metrics import COSTS, METRICS
from ppcl.eval.report_html import TEMPLATES
from ppcl.eval.results import Comparison, Evaluation, Speed


def cost_rows(result: Evaluation) -> list[list[str]]:
    """Parameters, times and memory, one row each."""
    rows = []
    for key, metric in COSTS.items():
        values = [model.params if key == "params" else model.costs.get(key) for model in result.models]
        if any(value is not None for value in values):
            cells = [number(value * metric.unit[0] if value is not None else None, 4) for value in values]
            rows.append([metric.in_unit, *cells])
    for key, name in (("speedup", "Times as fast, transformer"), ("speedup_end_to_end", "Times as fast, one picture")):
        if result.comparisons:
            rows.append([name, "1", *(number(getattr(row, key)) for row in result.comparisons)])
    return rows


def score_rows(result: Evaluation) -> list[list[str]]:
    """All numbers, one row each; the first model with its spread over seeds where it drew several."""
    numbers = [result.numbers_of(model) for model in result.models]
    rows = []
    for key, metric in METRICS.items():
        if not any(key in entries for entries in numbers):
            continue
        cells = [str(entries[key]) if key in entries else "-" for entries in numbers]
        spread = result.models[0].spread.get(key)
        if spread is not None and spread.std is not None:
            cells[0] += f" ± {number(spread.std, 2)}"
        rows.append([metric.heading, *cells])
    return rows


def _speed(labels: Sequence[str], rows: Sequence[Sequence[Speed]]) -> dict[str, Any]:
    """Times of several models at several step counts and batch sizes; empty if there are none.

    Args:
        labels: The models, as Markdown.
        rows: The times of each, in one order.
    """
    if not rows or not all(rows) or len({len(times) for times in rows}) > 1:
        return {}
    lines = []
    for same_work in zip(*rows, strict=True):
        first = same_work[0]
        work = (
            "transformer call"
            if first.part == "transformer"
            else f"pictures, {counted(first.num_inference_steps or 0, 'step')}"
        )
        cells = [
            f"{number(time.latency_ms)} ({number(time.latency_p10_ms)} to {number(time.latency_p90_ms)})"
            + (f", {time.times_as_fast:.2f}x" if time.times_as_fast is not None else "")
            + (f", {time.num_inference_steps} steps" if time.num_inference_steps != first.num_inference_steps else "")
            for time in same_work
        ]
        peaks = [time.peak_memory_bytes for time in same_work]
        memory = [number(peak / 1e6 if peak is not None else None) for peak in peaks]
        lines.append([work, str(first.batch_size), *cells, *memory])
    header = ["", "prompts at once", *(f"{label}, ms" for label in labels), *(f"{label}, peak MB" for label in labels)]
    runs = sorted({f"{counted(time.runs, 'run')} after {time.warmup_runs}" for times in rows for time in times})
    return {"header": header, "rows": lines, "counted": " or ".join(runs)}


def _timesteps(row: Comparison) -> list[list[str]]:
    """The velocity error by timestep."""
    return [
        [
            f"{number(step.timestep_high)} to {number(step.timestep_low)}",
            str(step.states),
            f"{number(step.error)} ({number(step.low)} to {number(step.high)})",
        ]
        for step in row.velocity_error_by_timestep
    ]


def _intervals(analysis: Analysis) -> list[list[str]]:
    """The paper's intervals and how often draws of the held-out prompts find them again."""
    return [
        [f"{stack.name} {a}-{b}", *(f"{share:.0%}" for share in (stable.same, stable.first, stable.last))]
        for stack in analysis.stacks
        for (a, b), stable in zip(stack.intervals, stack.interval_stability, strict=False)
    ]


CARD = ("average_drop", "velocity_error", "fid", "kid", "clip_score", "retrieval_at_1", "retrieval_at_5")


def measured_table(result: Evaluation) -> str:
    """The main numbers with what they were measured on, for a model card."""
    wanted = {METRICS[name].heading for name in CARD} | {metric.in_unit for metric in COSTS.values()}
    rows = [row for row in [*score_rows(result), *cost_rows(result)] if row[0] in wanted or row[0].startswith("Times")]
    return TEMPLATES.markdown(
        "measured.md", result=result, rows=rows, header=_header(result), level=f"{result.level:.0%}"
    )


def _header(result: Evaluation) -> list[str]:
    return ["", *(plain(model.label) for model in result.models)]


def report(result: Evaluation, plan: str = "", analysis: Analysis | None = None) -> str:
    """Lay the result out.

    Args:
        result: The evaluation.
        plan: What was replaced, as text; left out if empty.
        analysis: Which intervals were found, and how stable they are.
    """
    first, *others = (model.label for model in result.models)
    return TEMPLATES.markdown(
        "report.md",
        result=result,
        title=f"{', '.join(others)} against {first}" if others else first,
        level=f"{result.level:.0%}",
        seeds=max((len(spread.values) for spread in result.models[0].spread.values()), default=1),
        header=_header(result),
        floor=", ".join(f"{METRICS[name].label} {number(value)}" for name, value in result.floor.items()),
        rows=[*score_rows(result), *cost_rows(result)],
        speed=_speed(_header(result)[1:], [model.speed for model in result.models]),
        timesteps=[(row, _timesteps(row)) for row in result.comparisons if row.velocity_error_by_timestep],
        plan=plan,
        intervals=_intervals(analysis) if analysis else [],
        draws=max((stack.interval_draws for stack in analysis.stacks), default=0) if analysis else 0,
    )
