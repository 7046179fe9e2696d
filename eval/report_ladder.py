"""The report's section on one bundle at several sizes; what ``ppcl ladder`` measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from markupsafe import Markup

from ppcl.eval import figures
from ppcl.eval.report_data import RunData, pick
from ppcl.eval.report_html import TIMES, Chart, count, number, percent, render

COLUMNS = ("velocity_error", "fid", "clip_score", "retrieval_at_1", "retrieval_at_5", "average_drop")
HEADER = ("", "parameters", "share", "speed", "velocity error", "FID", "CLIP score", "R@1", "R@5", "average drop, %")


def ladder_section(run: RunData) -> Markup:
    """Table and curves of all sizes; empty if the bundle was not scored at several."""
    rungs = run.ladder.get("rungs") or []
    shares = [pick(rung, "predicted", "param_ratio") for rung in rungs]
    if not rungs or None in shares:
        return Markup()
    seeds = (run.ladder.get("teacher") or {}).get("seeds") or []
    teacher_means = [_mean([pick(seed, name) for seed in seeds]) for name in COLUMNS]
    rows = [["teacher", count(run.plan.model.params) if run.plan else "", "100%", f"1{TIMES}", "0", *teacher_means[1:]]]
    for rung, share in zip(rungs, shares, strict=True):
        scores = [number(pick(rung, "metrics", name)) for name in COLUMNS]
        speed = number(pick(rung, "predicted", "speedup")) + TIMES
        size = [count(pick(rung, "metrics", "params")), percent(share), speed]
        rows.append([f"keep {pick(rung, 'keep'):g}", *size, *scores])
    drops = [pick(rung, "metrics", "average_drop") for rung in rungs]
    errors = [pick(rung, "metrics", "velocity_error") for rung in rungs]
    noise = _spread([pick(seed, "average_drop") for seed in seeds])
    curves = figures.ladder_curves([100 * share for share in shares if share is not None], drops, errors)
    chart = Chart("Quality against size", curves, "How to read: further right is smaller; lower is better in both.")
    return render("ladder.html", header=HEADER, rows=rows, reading=_reading(drops, noise), chart=chart)


def _reading(drops: Sequence[float | None], noise: float | None) -> str:
    """Whether quality falls with size, in words computed from the numbers."""
    if noise is None or None in drops:
        return "The teacher's own spread between seeds was not measured, so small differences cannot be judged."
    measured = [drop for drop in drops if drop is not None]
    gains = [before - after for before, after in itertools.pairwise(measured) if after < before]
    spread = f"One teacher seed differs from the mean of its seeds by {number(noise)} points of average drop"
    if not gains:
        return f"{spread}; no smaller size scores better than a larger one."
    inside = "which is within twice that" if max(gains) <= 2 * noise else "which is more than noise explains"
    return f"{spread}; a smaller size beats the next larger one by at most {number(max(gains))}, {inside}."


def _mean(values: Sequence[float | None]) -> str:
    measured = [value for value in values if value is not None]
    return number(statistics.fmean(measured)) if measured else number(None)


def _spread(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return statistics.stdev(measured) if len(measured) > 1 else None
