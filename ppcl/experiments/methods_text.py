"""The comparison of methods as Markdown and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.common.files import atomic_path
from ppcl.common.tables import markdown_table, measured, number, provenance, spread
from ppcl.experiments.baselines import removed_blocks, run_keys
from ppcl.student.plan import CompressionPlan

if TYPE_CHECKING:
    from ppcl.run import Run

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
        metrics: One a seed (:func:`ppcl.experiments.compare.run_row`).
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
        known = [row[measure] for row in self.metrics if row.get(measure) is not None]
        return statistics.fmean(known) if known else None

    @property
    def spread(self) -> float:
        """Standard deviation of the drop over the seeds; 0 of one."""
        known = [float(row["average_drop"]) for row in self.metrics if row.get("average_drop") is not None]
        return statistics.stdev(known) if len(known) > 1 else 0.0

    @property
    def order(self) -> tuple[bool, float]:
        """Least drop first, velocity error where there is none; what has no plan last."""
        found = self.mean("average_drop")
        found = self.mean("velocity_error") if found is None else found
        return found is None, found or 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``methods.json``."""
        known = {"budget": self.budget, "method": self.name, "teacher_forwards": self.cost, "why_not": self.why_not}
        return {**known, "seeds": list(self.metrics)}

    def cells(self, params: int) -> list[str]:
        """The row of the table."""
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
            measured(self.metrics, "velocity_error"),
            measured(self.metrics, "fid"),
            measured(self.metrics, "average_drop"),
        ]


def write_up(run: Run, teacher: Mapping[str, Any], entries: Sequence[Entry], seeds: Sequence[int]) -> str:
    """The comparison as Markdown: a table for each budget, what has no plan and why, how to read it."""
    settings, steps = run.config.evaluate, run.config.distill
    model = next(plan.model for entry in entries for plan in entry.plans) if any(e.plans for e in entries) else None
    drops = [float(seed["average_drop"]) for seed in teacher["seeds"] if seed.get("average_drop") is not None]
    own_spread = statistics.stdev(drops) if len(drops) > 1 else 0.0
    parts = ["# Methods under equal budgets", "![average drop of every method](methods.png)"]
    for budget in dict.fromkeys(entry.budget for entry in entries):
        own = sorted((entry for entry in entries if entry.budget == budget), key=lambda entry: entry.order)
        parts.append(f"## {budget.replace('-', ' = ', 1)}")
        parts.append(markdown_table(HEADER, [entry.cells(model.params if model else 1) for entry in own]))
        parts += ["\n".join(f"* {e.label}: no plan: {e.why_not}" for e in own if e.why_not) or ""]
        parts.append(verdict(own, own_spread))
    teachers = number(own_spread, 2) if len(drops) > 1 else "-"
    parts.append(
        f"Every method has {steps.local_steps} local, {steps.alternating_steps} alternating and {steps.output_steps} "
        f"output steps of {steps.batch_size} states. Training seeds: {', '.join(map(str, seeds))}; over several: mean "
        f"± standard deviation, else 95% bootstrap intervals over prompts. {settings.num_prompts} prompts, "
        f"{settings.num_inference_steps} steps, features: {teacher['features']}. The teacher's own drop has a standard "
        f"deviation of {teachers}% over seeds of pictures. Two methods are told apart where their drops differ by more "
        "than twice that, and twice the standard deviation of their difference over training seeds. Parameters: those "
        "that are not zero; equal parameters are not equal speed: zeros make no common kernel faster. Teacher "
        "forwards: what a method costs beyond capture, analysis and fit stage, which all share; one transformer call "
        "on one state, a backward pass counts as two."
    )
    return "\n\n".join([*filter(None, parts), provenance(run.command, str(run.device))]) + "\n"


def verdict(entries: Sequence[Entry], own_spread: float = 0.0) -> str:
    """Who is first, and where the default is, in words computed from the rows.

    Args:
        entries: Of one budget, the first in front.
        own_spread: Standard deviation of the teacher's drop over seeds of pictures, percent.
    """
    known = [entry for entry in entries if not entry.order[0]]
    if not known:
        return "No method has a plan."
    first, place = known[0], {entry.name: number for number, entry in enumerate(known, 1)}
    captioned = first.mean("average_drop") is not None  # all or none: they share the features
    text = [f"Least {'drop' if captioned else 'velocity error'}: {first.label}"]
    if "ours" in place and first.name == "ours":
        text.append(", the default")
    elif "ours" in place:
        ours = known[place["ours"] - 1]
        gap, noise = ours.order[1] - first.order[1], 2 * max(own_spread, math.hypot(first.spread, ours.spread))
        several = min(len(first.metrics), len(ours.metrics)) > 1
        told = "cannot be told from it" if gap <= noise else "worse"
        told = f"{told} ({gap:.2f} behind, noise {noise:.2f})" if several else f"{gap:.2f} behind, of one seed"
        text.append(f"; the default is number {place['ours']} of {len(known)}, {told}")
    if not captioned:
        return "".join(text) + "."
    closest = min(known, key=lambda entry: _or_inf(entry.mean("velocity_error")))
    return (
        "".join(text) + f". Least velocity error: {closest.label}{', the default' if closest.name == 'ours' else ''}."
    )


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write a plot: for each budget the drop of every method, with the range over seeds or the interval.

    Args:
        entries: See :func:`write_up`.
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
    """Least and largest drop over the seeds, or the interval of the only one."""
    drops = [float(m["average_drop"]) for m in entry.metrics if m.get("average_drop") is not None]
    if len(drops) > 1:
        return min(drops), max(drops)
    limits = (entry.metrics[0].get("intervals") or {}).get("average_drop")
    return (limits[0], limits[1]) if limits and None not in limits else (drops[0], drops[0])
