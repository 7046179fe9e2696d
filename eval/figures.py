"""The report's charts as inline SVG that follows the page's colours.

matplotlib draws with placeholder colours; each is replaced by a CSS variable of the page,
so one drawing serves light and dark. Text stays text, in the page's font. Blocks are
numbered from 0; shaded spans are the plan's runs.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ppcl.analysis.artifacts import StackAnalysis
from ppcl.eval.report_data import differences, pick
from ppcl.pruning.artifacts import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[tuple[int, int]]
Point = tuple[float, float, float]  # value, low, high

# Placeholder colour -> CSS variable of the page (templates/report.css).
COLOURS = {
    "ink": "#0a0b01",
    "soft": "#0a0b02",
    "grid": "#0a0b03",
    "c1": "#0a0b04",
    "c2": "#0a0b05",
    "c3": "#0a0b06",
    "c4": "#0a0b07",
    "faint": "#0a0b08",
}
SERIES = (COLOURS["c1"], COLOURS["c2"], COLOURS["c3"], COLOURS["c4"])
MARKERS = ("o", "s", "^", "D")
COLOUR_SPAN = 7  # the map's colours tell runs up to this length apart; longer ones may be off the scale
WIDTH = 5.0  # inches; 360 SVG units, which a phone shows at almost that many pixels


def _figure(height: float, rows: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows`` stacked axes that share the horizontal axis; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y")
        ax.set_axisbelow(True)
    return figure, list(axes)


def _styled() -> AbstractContextManager[None]:
    """Matplotlib's settings for the length of one drawing."""
    import matplotlib

    ink, soft, grid = COLOURS["ink"], COLOURS["soft"], COLOURS["grid"]
    settings: Any = {  # Any: matplotlib types the keys as one literal, which is newer than some versions we allow
        "svg.fonttype": "none",
        "svg.image_inline": True,
        "text.parse_math": False,
        "font.size": 8.5,
        "text.color": ink,
        "axes.labelcolor": soft,
        "axes.edgecolor": soft,
        "axes.linewidth": 0.6,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "xtick.color": soft,
        "ytick.color": soft,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.5,
        "lines.markersize": 3.2,
    }
    return matplotlib.rc_context(settings)


def _svg(figure: Figure, label: str) -> Markup:
    """Serialise a figure: no metadata, no fixed size, page colours and font, reproducible ids."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return Markup(svg.replace("<svg", '<svg role="img"', 1))


def _mark_runs(ax: Axes, runs: Runs) -> None:
    for first, last in runs:
        ax.axvspan(first - 0.5, last + 0.5, color=COLOURS["c1"], alpha=0.13, linewidth=0)


def _block_axis(ax: Axes, num_blocks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(-0.6, num_blocks - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_xlabel("block")


def cka_map(stack: StackAnalysis, runs: Runs) -> Markup:
    """Heat map of cka(u, k): first replaced block u down, last replaced block k across."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    values = np.array([[math.nan if v is None else v for v in row] for row in stack.cka], dtype=float)
    near = [v for u, row in enumerate(stack.cka) for v in row[u : u + COLOUR_SPAN] if v is not None]
    low = min(near, default=0.0)
    with _styled():
        figure, (ax,) = _figure(3.9)
        ax.grid(visible=False)
        image = ax.imshow(values, cmap="cividis", vmin=min(low, 0.999), vmax=1.0, interpolation="none")
        for first, last in stack.intervals:
            box = (first - 0.5, first - 0.5), last - first + 1, last - first + 1
            ax.add_patch(Rectangle(*box, fill=False, edgecolor=COLOURS["ink"], linewidth=1, linestyle=(0, (2, 1.5))))
        for first, last in runs:
            box = (first - 0.5, first - 0.5), last - first + 1, last - first + 1
            ax.add_patch(Rectangle(*box, fill=False, edgecolor=COLOURS["c2"], linewidth=1.8))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        ax.set_xlabel("last replaced block k")
        ax.set_ylabel("first replaced block u")
        bar = figure.colorbar(image, ax=ax, shrink=0.8, extend="min", pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("CKA(u, k)")
        return _svg(figure, f"cka-{stack.name}")


def difference_curves(stack: StackAnalysis, runs: Runs) -> Markup:
    """D(u, k) from every start u, with the intervals that eqs. 4-5 cut out of them."""
    from matplotlib.lines import Line2D

    num_blocks = len(stack.cka)
    with _styled():
        figure, (ax,) = _figure(3.0)
        _mark_runs(ax, runs)
        shown: list[float] = []
        for first in range(num_blocks):
            curve = [(k, d) for k, d in differences(stack, first) if k <= first + 6]
            ax.plot(*_columns(curve), color=COLOURS["faint"], linewidth=0.7)
        for index, (first, last) in enumerate(stack.intervals):
            curve = [(k, d) for k, d in differences(stack, first) if k <= last + 1]
            shown += [d for _, d in curve]
            colour = SERIES[index % len(SERIES)]
            ax.plot(*_columns(curve), color=colour)
            ax.plot(*_columns([p for p in curve if p[0] == last]), "o", color=colour, markersize=4.5)
            end = _columns([p for p in curve if p[0] == last + 1])
            ax.plot(*end, "o", markeredgecolor=colour, markerfacecolor="none", markersize=4.5)
        if shown:
            margin = 0.15 * (max(shown) - min(shown)) + 1e-6
            ax.set_ylim(min(shown) - margin, max(shown) + margin)
        _block_axis(ax, num_blocks)
        ax.set_xlabel("block k")
        ax.set_ylabel("D(u, k)")
        soft = COLOURS["soft"]
        handles = [
            Line2D([], [], color=soft, marker="o", label="last block of an interval"),
            Line2D([], [], color=soft, marker="o", markerfacecolor="none", linestyle="", label="the rise that ends it"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return _svg(figure, f"difference-{stack.name}")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _lines(ax: Axes, series: Mapping[str, Sequence[float | None]]) -> None:
    for index, (name, values) in enumerate(series.items()):
        heights = [math.nan if v is None else v for v in values]
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        ax.plot(range(len(heights)), heights, label=name, color=colour, marker=marker)
    ax.set_ylim(bottom=0)


def block_scores(stack: StackAnalysis, runs: Runs) -> Markup:
    """Probe error by stream above, block influence below, by block."""
    with _styled():
        figure, (top, bottom) = _figure(3.6, rows=2)
        for ax in (top, bottom):
            _mark_runs(ax, runs)
        _lines(top, stack.probe_error)
        top.set_ylabel("probe error")
        figure.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        bottom.bar(range(len(stack.influence)), stack.influence, color=COLOURS["soft"], width=0.7)
        bottom.set_ylabel("block influence")
        _block_axis(bottom, len(stack.influence))
        return _svg(figure, f"scores-{stack.name}")


def linearity(stack: StackAnalysis, runs: Runs) -> Markup:
    """Held-out error of the best linear map for each FFN and for the text stream, by block."""
    groups = {"FFN": stack.ffn_linearity, "text": stack.text_linearity}
    groups = {name: series for name, series in groups.items() if series}
    with _styled():
        figure, axes = _figure(1.2 + 1.35 * len(groups), rows=len(groups))
        for ax, (name, series) in zip(axes, groups.items(), strict=True):
            _mark_runs(ax, runs)
            _lines(ax, series)
            ax.set_ylabel(f"{name}: error")
            ax.legend(loc="upper left", bbox_to_anchor=(0, 1.22), ncols=4, borderaxespad=0)
        _block_axis(axes[-1], len(stack.influence))
        return _svg(figure, f"linearity-{stack.name}")


def select_candidates(
    candidates: Sequence[Candidate], in_plan: Collection[tuple[str, int, int]], limit: int = 24
) -> list[Candidate]:
    """The chosen runs and the cheapest others, at most ``limit``, cheapest first."""

    def cost(candidate: Candidate) -> float:
        return candidate.probe_error if candidate.fitted_error is None else candidate.fitted_error

    def rank(candidate: Candidate) -> tuple[bool, bool, float]:
        taken = (candidate.stack, candidate.first, candidate.last) in in_plan
        return not taken, candidate.fitted_error is None, cost(candidate)

    return sorted(sorted(candidates, key=rank)[:limit], key=cost)


def candidate_bars(candidates: Sequence[Candidate], in_plan: Collection[tuple[str, int, int]]) -> Markup:
    """Velocity error of each candidate run: fitted block (bar) and chained probes (tick)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = select_candidates(candidates, in_plan)
    several = len({c.stack for c in shown}) > 1
    with _styled():
        figure, (ax,) = _figure(0.9 + 0.17 * len(shown))
        ax.grid(visible=False, axis="y")
        ax.grid(visible=True, axis="x")
        for row, candidate in enumerate(shown):
            taken = (candidate.stack, candidate.first, candidate.last) in in_plan
            if candidate.fitted_error is not None:
                ax.barh(row, candidate.fitted_error, height=0.62, color=COLOURS["c1" if taken else "faint"])
            colour = COLOURS["ink" if taken else "soft"]
            ax.plot([candidate.probe_error] * 2, [row - 0.36, row + 0.36], color=colour, linewidth=1.4)
        names = [f"{c.stack} " * several + f"{c.first}\N{EN DASH}{c.last}" for c in shown]
        ax.set_yticks(range(len(shown)), names)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.set_xlim(left=0)
        ax.set_xlabel("relative error of the final velocity")
        handles = [
            Patch(color=COLOURS["c1"], label="fitted block, chosen"),
            Patch(color=COLOURS["faint"], label="fitted block"),
            Line2D([], [], color=COLOURS["soft"], marker="|", linestyle="", markersize=8, label="chained probes"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.2)
        return _svg(figure, "candidates")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running median over at most ``window`` neighbours (shorter at the ends)."""
    half = max(1, window) // 2
    return [float(np.median(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def loss_points(rows: Sequence[Mapping[str, Any]], limit: int = 500) -> list[tuple[float, float]]:
    """(step, loss) of the rows with a positive, finite loss, thinned to at most ``limit`` points."""
    points = [(float(row["step"]), loss) for row in rows if (loss := pick(row, "loss")) is not None and loss > 0]
    stride = max(1, math.ceil(len(points) / limit))
    return points[::stride]


def loss_curve(stage: str, points: Sequence[tuple[float, float]]) -> Markup:
    """Loss by step on a logarithmic axis, with its running median."""
    steps, losses = _columns(points)
    with _styled():
        figure, (ax,) = _figure(2.3, width=3.6)
        ax.plot(steps, losses, color=COLOURS["c1"], alpha=0.35, linewidth=0.9)
        ax.plot(steps, smooth(losses, max(3, len(losses) // 20)), color=COLOURS["c1"])
        ax.set_yscale("log")
        _log_ticks(ax, losses)
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        return _svg(figure, f"loss-{stage}")


def _log_ticks(ax: Axes, values: Sequence[float]) -> None:
    """Label 1-2-5 steps as plain numbers: a loss rarely spans the decades that matplotlib labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    narrow = max(values) / min(values) < 30
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5, 7) if narrow else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def ladder_curves(shares: Sequence[float], drops: Sequence[float | None], errors: Sequence[float | None]) -> Markup:
    """Average drop above, velocity error below, against the share of the teacher's parameters in percent."""
    with _styled():
        figure, (top, bottom) = _figure(3.4, rows=2)
        for ax, values, colour in ((top, drops, SERIES[0]), (bottom, errors, SERIES[1])):
            ax.plot(shares, [math.nan if v is None else v for v in values], color=colour, marker="o")
        top.axhline(0, color=COLOURS["soft"], linewidth=0.8, linestyle=(0, (3, 2)))
        top.set_ylabel("average drop, %")
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("velocity error")
        bottom.set_xlabel("parameters, % of the teacher's")
        bottom.invert_xaxis()
        return _svg(figure, "ladder")


def velocity_curves(series: Mapping[str, Sequence[Mapping[str, float]]], first_colour: int = 0) -> Markup:
    """Velocity error by timestep, one line a model with its interval, in the order of sampling: noise on the left.

    Args:
        series: By model, rows with ``timestep_low``, ``timestep_high``, ``error``, ``low`` and ``high``.
        first_colour: Place of the first model's colour; 1 where the plots beside show what it is compared with, too.
    """
    with _styled():
        figure, (ax,) = _figure(2.6)
        for index, (name, rows) in enumerate(series.items(), first_colour):
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            middles = [(row["timestep_low"] + row["timestep_high"]) / 2 for row in rows]
            ax.fill_between(
                middles, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.15, lw=0
            )
            ax.plot(middles, [row["error"] for row in rows], color=colour, marker=marker, label=name)
        ax.set_ylim(bottom=0)
        ax.invert_xaxis()
        ax.set_xlabel("timestep")
        ax.set_ylabel("velocity error")
        if len(series) > 1:
            figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return _svg(figure, "velocity")


def quality_against(
    axis: str, labels: Sequence[str], costs: Sequence[float], measures: Mapping[str, Sequence[Point | None]]
) -> Markup:
    """Every measure of every model against one cost, a row of axes a measure.

    Args:
        axis: Name and unit of the cost.
        labels: The models.
        costs: One for each model.
        measures: By name, (value, low, high) for each model, or None where it is not known.
    """
    with _styled():
        figure, axes = _figure(0.5 + 1.5 * len(measures), rows=len(measures))
        for ax, (name, values) in zip(axes, measures.items(), strict=True):
            for index, (label, cost, point) in enumerate(zip(labels, costs, values, strict=True)):
                value, low, high = point or (math.nan, math.nan, math.nan)
                around = [[max(0.0, value - low)], [max(0.0, high - value)]]
                colour, marker = SERIES[index % len(SERIES)], MARKERS[index // len(SERIES) % len(MARKERS)]
                style: dict[str, Any] = {
                    "color": colour,
                    "marker": marker,
                    "markersize": 5.5,
                    "elinewidth": 1,
                    "linestyle": "",
                }
                ax.errorbar([cost], [value], around, label=label, capsize=2.5, **style)
            ax.set_ylabel(name)
        axes[-1].set_xlabel(axis)
        axes[-1].set_xlim(left=0, right=1.06 * max(costs))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return _svg(figure, f"quality-{axis}")
