"""An evaluation as Markdown: verdicts, notes, tables."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.analysis.artifacts import Analysis
from ppcl.common.tables import markdown_table, number, plain
from ppcl.eval.metrics import COSTS, METRICS
from ppcl.eval.results import Evaluation, Speed


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


def speed_table(labels: Sequence[str], rows: Sequence[Sequence[Speed]]) -> str:
    """Times of several models at several step counts and batch sizes; empty if there are none.

    Args:
        labels: The models, as Markdown.
        rows: The times of each, in one order.
    """
    if not rows or not all(rows) or len({len(times) for times in rows}) > 1:
        return ""
    lines = []
    for same_work in zip(*rows, strict=True):
        first = same_work[0]
        work = "transformer call" if first.part == "transformer" else f"pictures, {first.num_inference_steps} steps"
        cells = [
            f"{number(time.latency_ms)} ({number(time.latency_p10_ms)} to {number(time.latency_p90_ms)})"
            + (f", {time.times_as_fast:.2f}x" if time.times_as_fast is not None else "")
            for time in same_work
        ]
        peaks = [time.peak_memory_bytes for time in same_work]
        memory = [number(peak / 1e6 if peak is not None else None) for peak in peaks]
        lines.append([work, str(first.batch_size), *cells, *memory])
    header = ["", "prompts at once", *(f"{label}, ms" for label in labels), *(f"{label}, peak MB" for label in labels)]
    counted = sorted({f"{time.runs} runs after {time.warmup_runs}" for times in rows for time in times})
    guide = (
        f"Median (10th to 90th percentile) of {' or '.join(counted)} of warm-up. "
        f"x: times as fast as {labels[0]}, timed in turn with it, whatever else the machine did."
    )
    return f"{markdown_table(header, lines)}\n\n{guide}"


def _timesteps(result: Evaluation) -> list[str]:
    """The velocity error by timestep, a table a model."""
    parts = []
    for row in result.comparisons:
        lines = [
            [
                f"{number(step.timestep_high)} to {number(step.timestep_low)}",
                str(step.states),
                f"{number(step.error)} ({number(step.low)} to {number(step.high)})",
            ]
            for step in row.velocity_error_by_timestep
        ]
        if lines:
            title = f"Velocity error of {plain(row.label)} by timestep, on states of {plain(row.against)}:"
            parts += [title, markdown_table(["timestep", "states", "error"], lines)]
    return parts


def intervals_table(analysis: Analysis) -> str:
    """The paper's intervals and how often draws of the held-out prompts find them again, as Markdown."""
    rows = [
        [f"{stack.name} {a}-{b}", *(f"{share:.0%}" for share in (stable.same, stable.first, stable.last))]
        for stack in analysis.stacks
        for (a, b), stable in zip(stack.intervals, stack.interval_stability, strict=False)
    ]
    draws = max((stack.interval_draws for stack in analysis.stacks), default=0)
    if not rows:
        return ""
    note = f"Share of {draws} draws of half of the held-out prompts that find the interval, its start, its end again."
    return "\n\n".join([note, markdown_table(("interval", "the same", "its start", "its end"), rows)])


CARD = ("average_drop", "velocity_error", "fid", "kid", "clip_score", "retrieval_at_1", "retrieval_at_5")


def measured_table(result: Evaluation) -> str:
    """The main numbers with what they were measured on, for a model card."""
    wanted = {METRICS[name].heading for name in CARD} | {metric.in_unit for metric in COSTS.values()}
    rows = [row for row in [*score_rows(result), *cost_rows(result)] if row[0] in wanted or row[0].startswith("Times")]
    counted = f" ({result.reference_count:,})" if result.reference_count else ""
    lines = [
        f"{result.prompts} prompts that were not used for calibration, one picture each, "
        f"{result.num_inference_steps} steps; features: {plain(result.features)}. "
        f"In brackets {result.level:.0%} intervals; after ± the standard deviation over seeds of pictures.",
        f"FID and KID compare with {plain(result.reference)}{counted}." if result.reference else "",
    ]
    table = markdown_table(["", *(plain(model.label) for model in result.models)], rows)
    return f"{table}\n\n{' '.join(line for line in lines if line)}"


def report(result: Evaluation, plan: str = "", analysis: Analysis | None = None) -> str:
    """Lay the result out.

    Args:
        result: The evaluation.
        plan: What was replaced, as text; left out if empty.
        analysis: Which intervals were found, and how stable they are.
    """
    intervals = intervals_table(analysis) if analysis else ""
    labels = [plain(model.label) for model in result.models]
    against = f"{plain(result.reference or '')} ({result.reference_count or 'unknown number of'} pictures)"
    seeds = max((len(spread.values) for spread in result.models[0].spread.values()), default=1)
    speed = speed_table(labels, [model.speed for model in result.models])
    parts = [
        f"# {' against '.join([', '.join(labels[1:]), labels[0]]) if labels[1:] else labels[0]}",
        *(f"**{plain(row.verdict)}.**" for row in result.comparisons if row.verdict),
        f"{result.prompts} prompts, {result.num_inference_steps} steps, seed {result.seed}. "
        f"Features: {plain(result.features)}. "
        f"FID and the like compare with: {against if result.reference else 'nothing'}. "
        f"In brackets: {result.level:.0%} bootstrap intervals ({result.resamples:,} resamples, paired by prompt where "
        f"models are compared); after ±: standard deviation over {seeds} seeds of pictures.",
        *(f"> {plain(note)}" for note in result.notes),
        markdown_table(["", *labels], [*score_rows(result), *cost_rows(result)]),
        *(["## Speed and memory", speed] if speed else []),
        *_timesteps(result),
        *(["## Plan", plan] if plan else []),
        *(["## The paper's intervals", intervals] if intervals else []),
    ]
    return "\n\n".join(parts) + "\n"
