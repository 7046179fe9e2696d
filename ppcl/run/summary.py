"""What the command line prints: the prediction before training, the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ppcl.common.artifacts import load_artifact
from ppcl.common.files import read_json
from ppcl.student.plan import CompressionPlan

if TYPE_CHECKING:
    from ppcl.eval.results import Evaluation


def describe_runs(plan: CompressionPlan) -> str:
    """The runs of a plan as ``transformer_blocks 3-5, 7-9``."""
    parts = []
    for name, segments in plan.stacks.items():
        runs = [f"{s.first}-{s.last}" for s in segments if s.is_run]
        if runs:
            parts.append(f"{name} {', '.join(runs)}")
    return "; ".join(parts) or "none"


def describe_plan(plan: CompressionPlan) -> str:
    """What a plan replaces, in one line."""
    runs = describe_runs(plan)
    parts = [f"{runs} -> one block each"] if runs != "none" else []
    return "; ".join([*parts, *filter(None, [describe_width(plan)])]) or "nothing is replaced"


def describe_width(plan: CompressionPlan) -> str:
    """The smaller modules of a plan as ``img_mod.1 -> low_rank 5-9 in 24 blocks``."""
    found: dict[tuple[str, str], list[int]] = {}
    for segments in plan.stacks.values():
        for segment in segments:
            for path, part in segment.width.items():
                if part["kind"] in ("unit_gate", "no_output", "identity"):
                    continue  # beside the two maps of a text stream; they have no weights
                found.setdefault((path, str(part["kind"])), []).append(int(part.get("size", 0)))
    parts = []
    for (path, kind), sizes in sorted(found.items()):
        low, high = min(sizes), max(sizes)
        size = "" if not high else f" {low}" if low == high else f" {low}-{high}"
        parts.append(f"{path} -> {kind}{size} in {len(sizes)} blocks")
    return "; ".join(parts)


def print_prediction(out: Path) -> None:
    """Print what a plan should give, before any training."""
    plan = load_artifact(CompressionPlan, out / "plan.json")
    p = plan.predicted
    error = f", velocity error about {p.error:.3f} before distillation" if p.error is not None else ""
    Console(stderr=True, highlight=False).print(
        f"  plan: {describe_plan(plan)}\n"
        f"  predicted: {p.params / 1e6:.2f}M parameters ({p.param_ratio:.1%}), {p.speedup:.2f}x as fast{error}"
    )


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.2f}"


def print_summary(out: Path) -> None:
    """Print the final table and the path of the report."""
    from ppcl.eval.intervals import Interval
    from ppcl.eval.verdict import doubt
    from ppcl.teacher.loading import loading_call

    metrics = read_json(out / "eval" / "metrics.json")
    table = Table(title=f"{metrics['samples']['prompts']} prompts, features: {metrics['features']}")
    for name in ("", "teacher", "student", "teacher's own spread"):
        table.add_column(name, justify="left" if not name else "right")
    for key in (
        "params",
        "fid",
        "clip_score",
        "retrieval_at_1",
        "retrieval_at_5",
        "latency_ms",
        "latency_end_to_end_ms",
    ):
        spread = metrics["teacher_spread"].get(key, {}).get("std")
        noise = f"± {_number(spread)}" if spread is not None else ""
        table.add_row(key, _number(metrics["teacher"].get(key)), _number(metrics["student"].get(key)), noise)
    console = Console(highlight=False)
    console.print(table)
    drop, fid = metrics["average_drop"], metrics["fid_ratio"]
    limits = metrics.get("intervals", {}).get("average_drop")
    sure = f" ({limits[0]:.2f} to {limits[1]:.2f})" if limits and None not in limits else ""
    console.print(
        f"{metrics['param_ratio']:.1%} of the parameters, {metrics['speedup']:.2f}x as fast, "
        f"average drop {'-' if drop is None else f'{drop:.2f}%{sure}'}, FID {'-' if fid is None else f'{fid:.2f}x'}, "
        f"velocity error {metrics['fidelity']['velocity_error']:.3f}"
    )
    if (
        drop is not None
        and sure
        and (say := doubt(Interval(drop, limits[0], limits[1], metrics["samples"]["prompts"])))
    ):
        console.print(f"note:    the average drop: {say.removeprefix('; ')}", soft_wrap=True, markup=False)
    console.print(f"use it:  {loading_call(out / 'pipeline')}", soft_wrap=True, markup=False)
    console.print(f"report:  {out / 'report.html'}", soft_wrap=True, markup=False)


def print_evaluation(result: Evaluation, out: Path) -> None:
    """Print the table of an evaluation of several models, its notes and verdicts."""
    from ppcl.eval.results import cost_rows, score_rows

    table = Table(title=f"{result.prompts} prompts, features: {result.features}, {result.level:.0%} intervals")
    table.add_column("")
    for one in result.models:
        table.add_column(one.label, justify="right")
    for row in [*score_rows(result), *cost_rows(result)]:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    for comparison in result.comparisons:
        console.print(comparison.verdict, soft_wrap=True, markup=False)
    console.print(f"report:  {out / 'report.html'}", soft_wrap=True, markup=False)
