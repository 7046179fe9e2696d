"""The page's numbers: scores of all models, closeness to the first one, plots against size and time, speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ppcl.common.tables import counted
from ppcl.eval import figures
from ppcl.eval.metrics import CAPTION_SCORES, COSTS, FIDELITY, METRICS, SCORES, Metric
from ppcl.eval.report_html import (
    TIMES,
    Chart,
    count,
    number,
    percent,
    ranged,
    render,
    signed,
    size_bytes,
)
from ppcl.eval.results import Comparison, Evaluation, ModelResult, Number, Speed

SHOW: dict[str, Callable[[float | None], str]] = {
    "number": number,
    "share": percent,
    "count": count,
    "bytes": size_bytes,
}
NUM_PLOTTED = 3  # measures in a plot
PLOTTED = ("average_drop", "velocity_error", "fid", "kid", "clip_score")  # the first that are there
UP, DOWN = "\N{UPWARDS ARROW}", "\N{DOWNWARDS ARROW}"
VELOCITY_GUIDE = (
    "How to read: relative error of the transformer's output at the first model's own denoising states, by range of "
    "timesteps, from pure noise on the left to the finished picture on the right; shaded: the interval. Lower is "
    "closer to the first model."
)


def verdict(change: float, limits: tuple[float, float] | None, values: Sequence[float], metric: Metric) -> str:
    """Whether a difference says anything, as in tables of methods: beyond the prompts' noise and the seeds'.

    Args:
        change: The second model's number minus the first one's.
        limits: The interval of that difference over prompts; None if there is none.
        values: The first model's number with each of its seeds; their spread is the larger of two standard deviations
            and their full range.
        metric: Which direction is better.
    """
    if limits and limits[0] <= 0 <= limits[1]:
        return "The interval of the change holds 0: these prompts cannot tell the two apart."
    mean = sum(values) / max(len(values), 1)
    deviation = (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
    if len(values) > 1 and abs(change) <= max(2 * deviation, max(values) - min(values)):
        return "No more than the first model's own pictures change with the noise: no difference seen."
    beyond = [name for name, known in (("prompts", limits), ("noise of pictures", len(values) > 1)) if known]
    if not beyond:
        return "Neither an interval nor a second seed was measured: it cannot be judged."
    return (
        f"{'Better' if (change < 0) == (metric.better == 'lower') else 'Worse'}, beyond the {' and the '.join(beyond)}."
    )


def _shown(metric: Metric, entry: Number | None) -> str:
    show = SHOW[metric.shown_as]
    return ranged(show(entry.value if entry else None), entry.limits if entry else None, show)


def _change(value: float | None, is_share: bool) -> str:
    """A difference with its sign; of shares in points."""
    shown = 100 * value if is_share and value is not None else value
    return signed(shown, number(shown, 2))


def _score_table(
    first: ModelResult, second: ModelResult, differences: Mapping[str, Number], floor: Mapping[str, float]
) -> dict[str, Any]:
    """Scores of two models, one row each, with what they mean and what their difference says."""
    rows, explanations = [], []
    for key, metric in SCORES.items():
        before, after = first.numbers.get(key), second.numbers.get(key)
        if before is None and after is None:
            continue
        show, is_share = SHOW[metric.shown_as], metric.shown_as == "share"
        change = after.value - before.value if before and after else None
        limits = differences[key].limits if key in differences else None
        around_change = limits and Markup("<small>{} to {}</small>").format(
            *(_change(edge, is_share) for edge in limits)
        )
        shift = Markup("{}{} {}").format(_change(change, is_share), " points" * is_share, around_change or "")
        spread = first.spread.get(key)
        deviation = spread.std if spread else None
        around = f"\N{PLUS-MINUS SIGN}{show(deviation) if is_share else number(deviation, 2)}" if deviation else ""
        row = [metric.label, _shown(metric, before), _shown(metric, after), shift, around]
        rows.append([*row, show(floor.get(key)) if key in floor else ""] if floor else row)
        better = {"lower": "Lower is better.", "higher": "Higher is better.", "neither": ""}[metric.better]
        judged = ""
        if change is not None and metric.better != "neither" and (limits or spread):
            judged = verdict(change, limits, spread.values if spread else (), metric)
        explanations.append(Markup("{} {} <span class=verdict>{}</span>").format(metric.meaning, better, judged))
    header = ["", first.label, second.label, "change", f"spread of {first.label}", *(["floor"] if floor else [])]
    return {"header": header, "rows": rows, "explanations": explanations}


def _fidelity_table(row: Comparison) -> dict[str, Any]:
    """How close a model is to the first one, with what that is to be judged by."""
    lines, explanations = [], []
    for key, metric in FIDELITY.items():
        if key in row.fidelity:
            lines.append([metric.label, _shown(metric, row.fidelity[key]), number(row.scale.get(key))])
            explanations.append(metric.meaning)
    header = ["", f"{row.label} against {row.against}", "for scale"]
    return {"header": header, "rows": lines, "explanations": explanations}


def _drop(row: Comparison) -> dict[str, str] | None:
    """The average drop, with its interval and its parts."""
    if row.average_drop is None:
        return None
    per_score = row.average_drop_per_score
    names = [f"{METRICS[key].label} {number(per_score[key].value, 2)}%" for key in CAPTION_SCORES if key in per_score]
    around = row.average_drop.limits
    return {
        "value": number(row.average_drop.value, 2),
        "interval": f", interval {number(around[0], 2)}% to {number(around[1], 2)}%" if around else "",
        "parts": f" ({'; '.join(names)})" if names else "",
    }


def cautions(result: Evaluation) -> list[str]:
    """What a reader should know before believing the scores."""
    seeds = max((len(spread.values) for spread in result.models[0].spread.values()), default=1)
    lines = list(result.notes)
    if result.prompts < 1000:
        lines.append(
            f"Small sample: {result.prompts} prompts. One picture more or less moves retrieval by "
            f"{number(100 / max(result.prompts, 1), 2)} points, and FID needs thousands of pictures to settle."
        )
    if 1 < seeds < 4:
        lines.append(f"The spread comes from {seeds} seeds of the first model, so it is itself only a rough guide.")
    if result.features == "emoji":
        lines.append(
            "Scores come from the embedded emoji evaluator. It knows this domain only: do not compare them with "
            "published numbers of other evaluators."
        )
    return lines


def numbers_section(result: Evaluation) -> Markup:
    """Scores of all models with their meaning; of two models side by side, of more one row a model, to be sorted."""
    shown: dict[str, Any] = {"scores": None, "all": None}
    if len(result.models) == 2 and result.comparisons:
        row = result.comparisons[0]
        shown = {
            "scores": _score_table(result.models[0], result.models[1], row.differences, result.floor),
            "drop": _drop(row),
            "closeness": _fidelity_table(row),
        }
    else:
        shown["all"] = _sortable(result)
    level = percent(result.level, 0)
    return render("numbers.html", result=result, cautions=cautions(result), level=level, **shown)


def _costs(model: ModelResult) -> dict[str, float | None]:
    return {key: float(model.params) if key == "params" else model.costs.get(key) for key in COSTS}


def _sortable(result: Evaluation) -> dict[str, Any]:
    """One row a model: heads, cells as (number to sort by, what is shown), and the metrics that need an explanation."""
    numbers, costs = [result.numbers_of(model) for model in result.models], [_costs(model) for model in result.models]
    cost_keys = [key for key in COSTS if any(row[key] is not None for row in costs)]
    keys = [key for key in METRICS if any(key in row for row in numbers)]
    heads = ["Model", "Times as fast", *(COSTS[key].label for key in cost_keys), *(METRICS[k].heading for k in keys)]
    rows = []
    for model, row, cost in zip(result.models, numbers, costs, strict=True):
        comparison = result.comparison_of(model)
        faster = comparison.speedup if comparison else 1.0
        cells = [(faster, number(faster))]
        cells += [(cost[key], SHOW[COSTS[key].shown_as](cost[key])) for key in cost_keys]
        cells += [(row[key].value if key in row else None, _shown(METRICS[key], row.get(key))) for key in keys]
        rows.append((model.label, cells))
    return {"heads": heads, "rows": rows, "meanings": [METRICS[key] for key in keys]}


def _point(entry: Number | None, is_first: bool, key: str) -> figures.Point | None:
    if entry is None:  # what the others are compared with loses nothing against itself
        return (0.0, 0.0, 0.0) if is_first and key in ("average_drop", "velocity_error") else None
    low, high = entry.limits or (entry.value, entry.value)
    return entry.value, low, high


def _relative_times(result: Evaluation) -> list[float | None]:
    """Time of a transformer call in percent of the first model's: each was timed in turn with it, so load cancels."""
    speedups = [row.speedup if (row := result.comparison_of(model)) else None for model in result.models[1:]]
    return [100.0, *(100 / speedup if speedup else None for speedup in speedups)] if speedups else [None]


def _against(result: Evaluation, title: str, axis: str, costs: Sequence[float | None]) -> Chart | None:
    """Quality against one cost; None where a cost is not known."""
    numbers, labels = [result.numbers_of(model) for model in result.models], [model.label for model in result.models]
    keys = [key for key in PLOTTED if any(key in row for row in numbers)][:NUM_PLOTTED]
    measures = {METRICS[k].heading: [_point(row.get(k), i == 0, k) for i, row in enumerate(numbers)] for k in keys}
    costs_known = [cost for cost in costs if cost is not None]
    if not measures or len(costs_known) < len(labels):
        return None
    guide = (
        f"How to read: one mark a model, bars its intervals; further left is cheaper. {UP} higher is better, "
        f"{DOWN} lower is better."
    )
    return Chart(title, figures.quality_against(axis, labels, costs_known, measures), guide)


def plots_section(result: Evaluation) -> Markup:
    """Quality against parameters and against time, and the velocity error by timestep."""
    millions = [model.params / 1e6 for model in result.models]
    time = f"time of a transformer call, % of {result.models[0].label}"
    charts = [
        _against(result, "Quality against size", "parameters, millions", millions),
        _against(result, "Quality against time", time, _relative_times(result)),
    ]
    curves = {
        row.label: [step.model_dump() for step in row.velocity_error_by_timestep]
        for row in result.comparisons
        if row.velocity_error_by_timestep
    }
    if curves:
        svg = figures.velocity_curves(curves, first_colour=1)
        charts.append(Chart("Velocity error by timestep", svg, VELOCITY_GUIDE))
    return render("plots.html", charts=[chart for chart in charts if chart])


def speed_table(labels: Sequence[str], rows: Sequence[Sequence[Speed]]) -> Markup:
    """Times of one or many models, one line a kind of work; empty where they are missing or of different work.

    Args:
        labels: The models; the first is what the others are compared with.
        rows: The times of each, in one order.
    """
    work = {tuple((row.part, row.batch_size) for row in times) for times in rows}
    if not rows or not rows[0] or len(work) > 1:
        return Markup()
    lines = []
    for same_work in zip(*rows, strict=True):
        first = same_work[0]
        name = (
            "transformer call"
            if first.part == "transformer"
            else f"pictures, {counted(first.num_inference_steps or 0, 'step')}"
        )
        cells = []
        for position, row in enumerate(same_work):
            own = f" ({row.num_inference_steps} steps)" if row.num_inference_steps != first.num_inference_steps else ""
            cells.append(ranged(f"{number(row.latency_ms)}{own}", (row.latency_p10_ms, row.latency_p90_ms)))
            if position:
                cells.append(f"{number(row.times_as_fast)}{TIMES}" if row.times_as_fast is not None else number(None))
        memory = [size_bytes(row.peak_memory_bytes) for row in same_work]
        lines.append([name, first.batch_size, *cells, *memory])
    header = ["", "prompts at once", f"{labels[0]}, ms"]
    for label in labels[1:]:
        header += [f"{label}, ms", "as fast"]
    header += [f"{label}, peak memory" for label in labels]
    runs = sorted({str(row.runs) for times in rows for row in times})
    return render("speed.html", header=header, rows=lines, counted=" or ".join(runs))
