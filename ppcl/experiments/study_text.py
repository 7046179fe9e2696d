"""The study as Markdown: tables, and what comes out in words computed from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppcl.common.tables import markdown_table, measured, number, provenance, spread

FORM_NAMES = {"skipped": "skipped", "probes": "replaced by chained linear probes"}


@dataclass(frozen=True)
class Comparison:
    """Errors of removing ``size`` blocks next to each other and apart.

    Attributes:
        form: ``skipped`` or ``probes``.
        size: Number of removed blocks.
        contiguous: One relative velocity error a draw.
        scattered: The same for blocks of which no two are neighbours.
    """

    form: str
    size: int
    contiguous: Sequence[float]
    scattered: Sequence[float]

    @property
    def cheaper(self) -> str:
        """``contiguous`` or ``scattered``, whichever has the smaller mean error."""
        lower = statistics.fmean(self.contiguous) < statistics.fmean(self.scattered)
        return "contiguous" if lower else "scattered"

    @property
    def is_clear(self) -> bool:
        """Whether the means lie more than two standard errors of their difference apart."""
        if len(self.contiguous) < 2 or len(self.scattered) < 2:
            return False
        variance = sum(statistics.variance(v) / len(v) for v in (self.contiguous, self.scattered))
        difference = statistics.fmean(self.contiguous) - statistics.fmean(self.scattered)
        return abs(difference) > 2 * math.sqrt(variance)


def contiguity_section(comparisons: Sequence[Comparison]) -> str:
    """Section (a): contiguous against scattered removal."""
    lines = [
        [
            FORM_NAMES[c.form],
            str(c.size),
            f"{spread(c.contiguous)} ({len(c.contiguous)})",
            f"{spread(c.scattered)} ({len(c.scattered)})",
            c.cheaper + ("" if c.is_clear else " ~"),
        ]
        for c in comparisons
    ]
    header = ["removed blocks are", "blocks removed", "contiguous (draws)", "no two adjacent (draws)", "cheaper"]
    words = []
    for form, name in FORM_NAMES.items():
        of_form = [c for c in comparisons if c.form == form]
        wins = [c for c in of_form if c.cheaper == "contiguous"]
        clear = sum(c.is_clear for c in wins)
        lost = sum(c.is_clear for c in of_form if c.cheaper != "contiguous")
        if of_form:
            words.append(
                f"Blocks {name}: contiguous removal is cheaper in {len(wins)} of {len(of_form)} sizes "
                f"(clearly in {clear}; scattered removal clearly in {lost})."
            )
    reading = (
        "Mean ± standard deviation of the relative velocity error over random draws; the protected first and last "
        "blocks stay. Where there are fewer places than draws, all are taken. "
        "`~`: the means are within two standard errors."
    )
    empty = "The teacher has too few blocks to remove any two that are not adjacent."
    body = "\n\n".join([markdown_table(header, lines), reading, " ".join(words)]) if lines else empty
    return f"## Contiguous or scattered\n\n{body}"


def sequence_section(result: Mapping[str, Any]) -> str:
    """Section (b): two ways of local distillation."""
    errors = {name: [row["error"] for row in result[name]] for name in ("non-sequential", "sequential")}
    lines = [
        [name, spread(values), spread([row["median_step_seconds"] for row in result[name]])]
        for name, values in errors.items()
    ]
    header = ["local distillation", "velocity error after", "median seconds a step"]
    wins = sum(a < b for a, b in zip(errors["non-sequential"], errors["sequential"], strict=True))
    change = statistics.fmean(errors["sequential"]) / statistics.fmean(errors["non-sequential"]) - 1
    words = (
        f"Non-sequential distillation ends at the smaller error with {wins} of {len(errors['sequential'])} seeds; "
        f"sequential distillation ends {abs(change):.1%} {'higher' if change > 0 else 'lower'} on average."
    )
    reading = (
        f"The optimal plan, {result['steps']} local steps each, same batches, starts and seeds; no output stage. "
        f"Before training the error is {number(result['before'])}."
    )
    return "\n\n".join(["## Non-sequential or sequential", markdown_table(header, lines), reading, words])


def squares_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Section (c): predictions by squares and by plain sums."""
    lines = [
        [
            str(row["removed"]),
            str(row["runs"]),
            measured([row], "measured"),
            *(number(row[k]) for k in ("squares", "sum")),
            number(row["measured"] / row["squares"]),
        ]
        for row in rows
    ]
    header = ["blocks removed", "runs", "measured", "root of summed squares", "plain sum", "measured / squares"]
    several = [row for row in rows if row["runs"] > 1]
    words = "No plan has more than one run, so nothing can be said about sums."
    if several:
        nearer = sum(_gap(row, "squares") < _gap(row, "sum") for row in several)
        ratio = statistics.median(row["measured"] / row["squares"] for row in several)
        words = (
            f"Squares predict the measured error better than the plain sum in {nearer} of {len(several)} plans of "
            f"several runs; the measured error is {number(ratio)} times the prediction by squares (median)."
        )
    reading = "The planner's best plan of every size, each run with its fitted candidate, not trained any further."
    return "\n\n".join(["## Do squares of errors add?", markdown_table(header, lines), reading, words])


def _gap(row: Mapping[str, Any], key: str) -> float:
    return abs(math.log(max(row[key], 1e-12) / max(row["measured"], 1e-12)))


def planner_section(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Section (d): the planner's modes."""
    lines = [
        [
            row["mode"],
            str(row["removed"]),
            f"{row['fitted']} of {row['runs']}",
            number(row["predicted"]),
            *(measured([row], k) for k in ("measured", "starts")),
        ]
        for row in rows
    ]
    header = ["plan", "blocks removed", "runs fitted", "predicted", "measured", "measured, plain starts"]
    plans = [row for row in rows if row["predicted"] is not None]
    words = f"Least measured error: {min(rows, key=lambda row: row['measured'])['mode']}."
    if len(plans) > 1:
        orders = [[row["mode"] for row in sorted(plans, key=lambda row: row[key])] for key in ("predicted", "measured")]
        same = "the same order" if orders[0] == orders[1] else "another order"
        words += f" Prediction and measurement put the {len(plans)} plans with a prediction in {same}."
    reading = (
        "Plans that remove equally many blocks, before distillation: fitted candidates where the fit stage made one, "
        "else plain starts. A dash: some run was no candidate, so nothing is predicted."
    )
    tail = ["\n".join(f"* {note}." for note in notes)] if notes else []
    return "\n\n".join(["## Predicted and measured", markdown_table(header, lines), reading, words, *tail])


def write_up(results: Mapping[str, Any], info: Mapping[str, Any], command: str, device: str) -> str:
    """Put the four sections together.

    Args:
        results: ``contiguity``, ``sequence``, ``squares`` and ``planner``, as the study's parts return them.
        info: ``model``, ``states``, ``seeds`` and ``notes``.
        command: The command line.
        device: The torch device.
    """
    sections = [
        "# The paper's observations on this teacher",
        f"Teacher: {info['model']}. Errors are relative velocity errors on up to {info['states']} held-out states; "
        f"training seeds: {', '.join(map(str, info['seeds']))}. In brackets: 95% bootstrap intervals over them.",
        contiguity_section([Comparison(**row) for row in results["contiguity"]]),
        sequence_section(results["sequence"]),
        squares_section(results["squares"]),
        planner_section(results["planner"], info["notes"]),
        provenance(command, device),
    ]
    return "\n\n".join(sections) + "\n"
