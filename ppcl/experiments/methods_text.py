"""The comparison of methods as Markdown and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.common.files import atomic_path
from ppcl.common.tables import markdown_table, number, spread
from ppcl.experiments.baselines import removed_blocks, run_keys
from ppcl.experiments.noise import READING, by_seed, cell, difference, is_alike, without_items
from ppcl.experiments.runner import RowRunner
from ppcl.student.plan import CompressionPlan

HEADER = (
    *("method", "takes away", "blocks removed", "parameters", "speed-up (predicted)", "teacher forwards"),
    *("velocity error before", "after", "FID", "average drop, %"),
)
TICKS = (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100)
COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626")


@dataclass(frozen=True)
class Entry:
    """What one method came to under one budget.

    Attributes:
        budget: Its name, e.g. ``keep-0.7``.
        name: Of the method.
        label: Of the method, for people.
        units: What it takes away.
        plans: One a seed.
        metrics: One a seed (:meth:`ppcl.experiments.runner.RowRunner.run`).
        cost: Teacher forwards beyond the stages that all share; None if it does not say.
        why_not: Why there is no plan, if there is none.
    """

    budget: str
    name: str
    label: str
    units: str
    plans: Sequence[CompressionPlan] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    cost: float | None = None
    why_not: str | None = None

    def mean(self, measure: str) -> float | None:
        """Mean of a measure over the seeds that have it."""
        values = [row[measure] for row in self.metrics if row.get(measure) is not None]
        return statistics.fmean(values) if values else None

    @property
    def order(self) -> tuple[bool, float]:
        """Least drop first, velocity error where there is none; what has no plan last."""
        score = self.mean("average_drop")
        score = self.mean("velocity_error") if score is None else score
        return score is None, score or 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``methods.json``."""
        about = {"budget": self.budget, "method": self.name, "teacher_forwards": self.cost, "why_not": self.why_not}
        return {**about, "seeds": without_items(self.metrics)}

    def cells(self, params: int, is_tied: bool) -> list[str]:
        """The row of the table; marked if its drop cannot be told apart from the first one's."""
        if not self.metrics:
            return [self.label, self.units, *["-"] * (len(HEADER) - 2)]
        left = [m["params"] * (1 - m.get("zeros", 0.0)) / params for m in self.metrics]
        return [
            self.label,
            self.units,
            spread([float(removed_blocks(run_keys(plan))) for plan in self.plans], 2),
            f"{statistics.fmean(left):.1%}",
            f"{statistics.fmean(plan.predicted.speedup for plan in self.plans):.2f}",
            "-" if self.cost is None else f"{self.cost:,.0f}",
            number(self.mean("velocity_error_before")),
            cell(self.metrics, "velocity_error"),
            cell(self.metrics, "fid"),
            cell(self.metrics, "average_drop") + (" ~" if is_tied else ""),
        ]


def paragraphs(runner: RowRunner, entries: Sequence[Entry], training_seeds: Sequence[int]) -> list[str]:
    """The comparison in words: a table for each budget, what has no plan and why, how to read it."""
    settings, steps, about = runner.session.config.evaluate, runner.session.config.distill, runner.summary()
    params = next((plan.model.params for entry in entries for plan in entry.plans), 1)
    parts = ["# Methods under equal budgets", "![average drop of every method](methods.png)"]
    for budget in dict.fromkeys(entry.budget for entry in entries):
        ranked = sorted((entry for entry in entries if entry.budget == budget), key=lambda entry: entry.order)
        first = ranked[0].metrics
        cells = [e.cells(params, i > 0 and is_alike(first, e.metrics, "average_drop")) for i, e in enumerate(ranked)]
        parts += [f"## {budget.replace('-', ' = ', 1)}", markdown_table(HEADER, cells)]
        parts += ["\n".join(f"* {e.label}: no plan: {e.why_not}" for e in ranked if e.why_not), verdict(ranked)]
    parts.append(
        f"Every method has {steps.local_steps} local, {steps.alternating_steps} alternating and {steps.output_steps} "
        f"output steps of {steps.batch_size} states. Training seeds: {', '.join(map(str, training_seeds))}; picture "
        f"seeds of each: {settings.picture_seeds}. {settings.num_prompts} prompts, {settings.num_inference_steps} "
        f"steps, features: {about['features']}; drops are against the mean of {len(about['seeds'])} picture seeds of "
        f"the teacher. {READING} `~`: not told apart from the first row. Parameters: those that are not zero; equal "
        "parameters are not equal speed: zeros make no common kernel faster. Teacher forwards: what a method costs "
        "beyond capture, analysis and fit stage, which all share; one transformer call on one state, a backward pass "
        "counts as two."
    )
    return parts


def verdict(entries: Sequence[Entry]) -> str:
    """Who is first, who cannot be told apart from it, and where the default is, computed from the rows.

    Args:
        entries: Of one budget, the first in front.
    """
    ranked = [entry for entry in entries if not entry.order[0]]
    if not ranked:
        return "No method has a plan."
    first, place = ranked[0], {entry.name: number for number, entry in enumerate(ranked, 1)}
    measure = "average_drop" if first.mean("average_drop") is not None else "velocity_error"  # they share the features
    text = f"Least {'drop' if measure == 'average_drop' else 'velocity error'}: {first.label}"
    if first.name == "ours":
        text += ", the default"
    elif "ours" in place:
        gap = difference(first.metrics, ranked[place["ours"] - 1].metrics, measure)
        assert gap is not None  # all with a place have the measure
        told = "worse" if gap.is_told_apart else "cannot be told apart from it"
        text += f"; the default is number {place['ours']} of {len(ranked)}, {told} ({gap.value:.2f} behind; {gap})"
    tied = [entry.label for entry in ranked[1:] if is_alike(first.metrics, entry.metrics, measure)]
    text += f". Not told apart from the first: {', '.join(tied) or 'none'}."
    if measure == "velocity_error":
        return text
    closest = min(ranked, key=lambda entry: _or_inf(entry.mean("velocity_error")))
    return f"{text} Least velocity error: {closest.label}{', the default' if closest.name == 'ours' else ''}."


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write a plot: for each budget the drop of every method, with the range over seeds or the interval.

    Args:
        entries: See :func:`paragraphs`.
        path: A ``.png``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    budgets = list(dict.fromkeys(entry.budget for entry in entries))
    units = list(dict.fromkeys(entry.units for entry in entries))
    names = list(dict.fromkeys(entry.label for entry in entries))
    figure = Figure(figsize=(4.2 * len(budgets) + 1.8, 0.3 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for ax, budget in zip(axes, budgets, strict=True):
        for entry in (e for e in entries if e.budget == budget and e.mean("average_drop") is not None):
            low, high = _range(entry)
            colour, y = COLOURS[units.index(entry.units) % len(COLOURS)], names.index(entry.label)
            ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
            ax.plot([entry.mean("average_drop")], [y], "o", color=colour)
        ax.set_title(budget.replace("-", " = ", 1))
        ax.set_xlabel("average drop, %")
        ax.set_xscale("symlog", linthresh=2)
        ax.xaxis.set_major_locator(FixedLocator(TICKS))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.axvline(0, color="#999999", linewidth=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for number_, unit in enumerate(units):
        axes[-1].plot([], [], "o", color=COLOURS[number_ % len(COLOURS)], label=unit)
    axes[-1].legend(loc="best", fontsize="small", frameon=False)
    canvas = FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary))


def _range(entry: Entry) -> tuple[float, float]:
    """Least and largest drop over training and picture seeds, or the interval of the only one."""
    drops = by_seed(entry.metrics, "average_drop").flatten().tolist()
    if len(drops) > 1:
        return min(drops), max(drops)
    limits = (entry.metrics[0].get("intervals") or {}).get("average_drop")
    return (limits[0], limits[1]) if limits and None not in limits else (drops[0], drops[0])
