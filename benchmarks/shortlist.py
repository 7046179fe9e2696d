"""How many runs need a short fit? Plans from the fitted runs of a shortlist, beside plans from all of them fitted.

    python benchmarks/shortlist.py RUN docs/shortlist.md

RUN is a run of `ppcl plan emoji --out RUN --set fit.max_candidates=1000`, which fits every run of blocks. Nothing is
trained here: runs that a shortlist leaves out lose their fitted cost, and the planner lays out the rest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppcl.analysis.artifacts import Analysis
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table
from ppcl.config import PlanConfig
from ppcl.errors import UserError
from ppcl.pruning.artifacts import Candidate, Candidates
from ppcl.pruning.planner import plan
from ppcl.pruning.runs import shortlist

COUNTS = (8, 12, 16, 20, 24, 32, 48)
BUDGETS: dict[str, list[dict[str, Any]]] = {
    "depth and width": [
        *({"keep": keep} for keep in (0.84, 0.7, 0.5, 0.3)),
        *({"speedup": speedup} for speedup in (1.2, 1.5, 1.7, 2.0)),
    ],
    "depth alone": [{"keep": keep, "width": ()} for keep in (0.9, 0.84, 0.7, 0.6, 0.5)],
}


def key(run: Candidate) -> tuple[str, int, int]:
    """Stack, first block, last block."""
    return run.stack, run.first, run.last


def errors_of(analysis: Analysis, candidates: Candidates, budgets: list[dict[str, Any]]) -> list[float | None]:
    """The predicted error of the best plan under each budget; None where none meets it."""
    errors: list[float | None] = []
    for budget in budgets:
        try:
            errors.append(plan(analysis, candidates, PlanConfig(**budget)).predicted.error)
        except UserError:
            errors.append(None)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    analysis = load_artifact(Analysis, given.run / "analysis.json")
    known = load_artifact(Candidates, given.run / "candidates.json")
    every = [run for run in known.candidates if run.fitted_error is not None]
    probes = {key(run): run.probe_error for run in known.candidates}
    always = [(stack.name, *interval) for stack in analysis.stacks for interval in stack.intervals]
    text = (
        "# How many runs need a short fit?\n\nWritten by `python benchmarks/shortlist.py RUN docs/shortlist.md`. RUN "
        f"has fitted {len(every)} of {len(probes)} runs of blocks of the embedded teacher. Predicted velocity error of "
        "the best plan under each budget, in costs of fitted blocks, from the runs of a shortlist; in brackets how "
        "much more than from all of them.\n\nWhat a short fit leaves of a run's linear error, by blocks saved:\n\n"
    )
    lengths = sorted({run.removed for run in every})
    shares = {n: [(run.fitted_error or 0) / run.probe_error for run in every if run.removed == n] for n in lengths}
    rows = [[str(n), str(len(found)), f"{sum(found) / len(found):.2f}"] for n, found in shares.items()]
    text += markdown_table(["blocks saved", "runs", "fitted / linear error (mean)"], rows)
    for title, budgets in BUDGETS.items():
        best = errors_of(analysis, known, budgets)
        rows = [[f"all {len(every)}", *("-" if error is None else f"{error:.4f}" for error in best)]]
        for count in COUNTS:
            chosen = set(shortlist(analysis.model, probes, known.width, always, count))
            kept = [r if key(r) in chosen else replace(r, fitted_error=None, start=None) for r in known.candidates]
            found = errors_of(analysis, replace(known, candidates=tuple(kept)), budgets)
            cells = [
                "-" if error is None or least is None else f"{error:.4f} ({100 * (error / least - 1):+.1f}%)"
                for error, least in zip(found, best, strict=True)
            ]
            rows.append([str(count), *cells])
        names = [f"{kind} {value:g}" for budget in budgets for kind, value in budget.items() if kind != "width"]
        text += f"\n\n## {title.capitalize()}\n\n" + markdown_table(["fitted runs", *names], rows)
    write_text(given.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
