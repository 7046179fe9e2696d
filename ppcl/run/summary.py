"""What the command line prints: the prediction before training, the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ppcl.common.artifacts import load_artifact
from ppcl.student.plan import CompressionPlan
from ppcl.student.words import smaller_modules

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
    return "; ".join([*parts, *smaller_modules(plan)]) or "nothing is replaced"


def print_prediction(out: Path) -> None:
    """Print what a plan should give, before any training."""
    plan = load_artifact(CompressionPlan, out / "plan.json")
    p = plan.predicted
    total = f", {plan.share_of_first:.1%} of the first teacher's" if plan.share_of_first else ""
    error = f", velocity error about {p.error:.3f} before distillation" if p.error is not None else ""
    tried = f" (of {len(plan.recovered)}, the one that recovered best)" if plan.recovered else ""
    Console(stderr=True, highlight=False, markup=False).print(
        f"  plan: {describe_plan(plan)}{tried}\n"
        f"  predicted: {p.params / 1e6:.2f}M parameters ({p.param_ratio:.1%}{total}), {p.speedup:.2f}x as fast{error}",
        soft_wrap=True,
    )


def print_summary(out: Path) -> None:
    """Print the final table of a run, the line that loads its pipeline, and the path of the report."""
    from ppcl.eval.results import load_evaluation
    from ppcl.teacher.loading import loading_call

    print_evaluation(load_evaluation(out / "eval" / "metrics.json"))
    console = Console(highlight=False, markup=False)
    console.print(f"use it:  {loading_call(out / 'pipeline')}", soft_wrap=True)
    console.print(f"report:  {out / 'report.html'}", soft_wrap=True)


def print_evaluation(result: Evaluation) -> None:
    """Print the table of an evaluation, its notes and verdicts."""
    from ppcl.eval.markdown import cost_rows, score_rows

    table = Table(title=f"{result.prompts} prompts, features: {result.features}, {result.level:.0%} intervals")
    table.add_column("")
    for model in result.models:
        table.add_column(model.label, justify="right")
    for row in [*score_rows(result), *cost_rows(result)]:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for comparison in result.comparisons:
        console.print(comparison.verdict, soft_wrap=True)
