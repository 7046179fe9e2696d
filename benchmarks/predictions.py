"""Does the planner know what a plan will cost? Predicted against measured velocity errors of random plans.

    python benchmarks/predictions.py RUN docs/predictions.md

RUN is a run of `ppcl fit emoji --out RUN --set fit.max_candidates=1000`, which fits every run of blocks. Nothing is
trained here: plans are put together from fitted blocks and smaller modules, and run on the states of the prices.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.sweep import batches_of
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table
from ppcl.config import DistillConfig, PlanConfig, for_model, load_config
from ppcl.distill.streamed import Starts
from ppcl.eval.velocity import state_errors
from ppcl.pruning import exchanges, knapsack
from ppcl.pruning.artifacts import Candidates, load_candidates
from ppcl.pruning.knapsack import Edge, Route, edges_of, layout_of
from ppcl.pruning.planner import plan
from ppcl.student.assembly import assemble_student
from ppcl.student.bundle import members
from ppcl.student.plan import CompressionPlan
from ppcl.student.prediction import SHARE, bounded, predict
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.loading import load_pipeline

KINDS: dict[str, Callable[[np.random.Generator], tuple[int, int]]] = {  # runs, blocks with smaller modules
    "4 runs": lambda _: (4, 0),
    "8 runs": lambda _: (8, 0),
    "smaller modules alone": lambda generator: (0, int(generator.integers(3, 25))),
    "both": lambda generator: (int(generator.integers(1, 5)), int(generator.integers(3, 13))),
}


BUDGETS: list[dict[str, Any]] = [
    *({"keep": keep} for keep in (0.84, 0.7, 0.5, 0.3)),
    *({"speedup": speedup} for speedup in (1.2, 1.5, 1.7)),
    *({"keep": keep, "width": ()} for keep in (0.84, 0.7, 0.5)),
]


def random_route(edges: list[Edge], runs: int, blocks: int, generator: np.random.Generator) -> Route:
    """So many runs and blocks with smaller modules, of no two at the same place, if there is room."""
    for _ in range(10_000):
        chosen: list[int] = []
        taken: set[int] = set()
        for number in generator.permutation(len(edges)).tolist():
            edge, span = edges[number], range(edges[number].first, edges[number].last + 1)
            wanted = runs if edge.segment.is_run else blocks
            have = sum(edges[n].segment.is_run == edge.segment.is_run for n in chosen)
            if have < wanted and not taken & set(span):
                chosen.append(number)
                taken |= set(span)
        if len(chosen) == runs + blocks or not runs:
            return tuple(sorted(chosen, key=lambda n: edges[n].first))
    raise AssertionError(f"no room for {runs} runs and {blocks} blocks")


class Judge:
    """Measures plans of a run, whose substitutes are as the fit stage left them.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.config = run, for_model("emoji", load_config([], []))
        self.source = ResidentBlocks(load_pipeline("emoji", torch.device("cpu")).transformer)
        fit, held_out = self.config.fit, {"held-out": States(run / "calibration", "held-out")}
        self.batches = batches_of(held_out, fit.batch_size, {"held-out": fit.eval_states}, padded=False)

    @torch.no_grad()
    def error(self, plan: CompressionPlan) -> float:
        """The relative velocity error on the states of the prices."""
        settings = DistillConfig(**{"local_steps": 0, "output_steps": 0})
        starts = Starts(self.source, plan, self.run, settings)
        blocks = {key: starts(key) for key, _ in members(plan)}
        student = assemble_student(self.source.transformer, self.source.adapter, plan, blocks).eval()
        states = (batch.load().arguments for batch in self.batches)
        return state_errors(self.source.transformer, student, states, "auto").error.value


def random_plans(judge: Judge, analysis: Analysis, candidates: Candidates, plans: int) -> list[list[str]]:
    """Rows of the first table."""
    fitted = [run for run in candidates.candidates if run.fitted_error is not None]
    edges = edges_of(analysis.model, fitted, candidates.width, False, candidates.vectors)
    edges = [edge for edge in edges if not (edge.segment.is_run and edge.segment.width)]  # runs stay whole
    generator = np.random.default_rng(0)
    rows = []
    for kind, sizes in KINDS.items():
        found = []
        for _ in range(plans):
            route = random_route(edges, *sizes(generator), generator)
            layout = layout_of(analysis.model, [edges[n] for n in route])
            made = CompressionPlan(analysis.model, "optimal", {"keep": 1.0}, layout, predict(analysis.model, layout))
            squares = math.sqrt(sum(float(bounded(np.array(edges[n].cost))) for n in route))
            found.append((judge.error(made), squares, made.predicted.error))
        measured, alone, together = np.array(found).T
        for name, predicted in (("sum of squares", alone), ("joint", together)):
            ratio = np.quantile(measured / predicted, [0.5, 0.05, 0.95])
            rank = f"{spearmanr(measured, predicted).statistic:.3f}"
            span = f"{measured.min():.3f} to {measured.max():.3f}"
            rows.append([kind, name, span, rank, f"{ratio[0]:.2f}", f"{ratio[1]:.2f} to {ratio[2]:.2f}"])
    return rows


def best_plans(judge: Judge, analysis: Analysis, candidates: Candidates) -> list[list[str]]:
    """Rows of the second table: the plan by summed squares, and that by joint errors, under each budget."""
    rows = []
    for budget in BUDGETS:
        cells = []
        for vectors in ({}, candidates.vectors):
            began = time.perf_counter()
            made = plan(analysis, replace(candidates, vectors=vectors), PlanConfig(**budget))
            seconds = time.perf_counter() - began
            cells += [f"{made.predicted.error:.4f}", f"{judge.error(made):.4f}", f"{seconds:.1f}"]
        kind, value = next(iter(budget.items()))
        rows.append([f"{kind} {value:g}{', depth alone' if 'width' in budget else ''}", *cells])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plans", type=int, default=24, help="of each kind")
    parser.add_argument("--share", type=float, default=SHARE, help="of products, where plans are looked for")
    given = parser.parse_args(argv)
    exchanges.SHARE = knapsack.SHARE = given.share
    judge = Judge(given.run)
    analysis, candidates = load_artifact(Analysis, given.run / "analysis.json"), load_candidates(given.run)
    header = ["plans of", "prediction", "measured", "rank correlation", "measured / predicted: median", "5% to 95%"]
    table = markdown_table(header, random_plans(judge, analysis, candidates, given.plans))
    each = ("predicted", "measured", "seconds")
    header = ["budget", *(f"by {name}: {one}" for name in ("squares", "joint errors") for one in each)]
    text = (
        f"# Predicted and measured errors of plans, embedded teacher\n\nWritten by `python benchmarks/predictions.py "
        f"RUN {given.out} --share {given.share:g}`: {given.plans} random plans of each kind, of briefly fitted blocks "
        f"and untrained smaller modules, on the {judge.config.fit.eval_states} held-out states of the prices. "
        "The sum of squares takes "
        "options for unrelated; jointly, products of their vectors say how they add up, and large errors "
        "add up to less (ppcl/student/prediction.py)."
        f"\n\n{table}\n\n## Plans that are chosen\n\nThe same budgets with either prediction; nothing is trained."
        f"\n\n{markdown_table(header, best_plans(judge, analysis, candidates))}\n"
    )
    write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
