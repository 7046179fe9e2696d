"""Does it pay to select plans by a short recovery (`plan.recover`)? The best few plans, all of them trained in full.

    python benchmarks/recover.py RUN docs/recover.md

RUN is a run of `ppcl fit emoji --out RUN`; nothing in it is changed, and what is trained is kept in `RUN-recover`, from
which a killed benchmark goes on. Plans are chosen by one half of the held-out prompts and judged by the other half.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table
from ppcl.config import PlanConfig, for_model, load_config
from ppcl.distill.choice import Choice, Judge
from ppcl.pruning.artifacts import load_candidates
from ppcl.pruning.planner import best_plans
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline
from ppcl.teacher.pipeline_call import guidance_weight

BUDGETS: dict[str, dict[str, Any]] = {
    "keep 0.84, depth alone": {"keep": 0.84, "width": ()},
    "keep 0.7, depth alone": {"keep": 0.7, "width": ()},
    "keep 0.5, depth alone": {"keep": 0.5, "width": ()},
    "keep 0.3": {"keep": 0.3},
    "speedup 1.5": {"speedup": 1.5},
}
HEADER = [
    *(
        "budget",
        "seed",
        "plans",
        "error in full: planner's first",
        "selected by recovery",
        "best of all",
        "mean of all",
    ),
    *("rank with the error in full: predicted", "untrained", "after a short recovery", "CPU seconds of the choice"),
]


def row_of(name: str, plans: list[CompressionPlan], choosing: Choice, judging: Choice, full: int) -> list[str]:
    """Choose one of some plans, train all of them in full, and compare."""
    began = time.process_time()
    selected = choosing.of(plans)
    seconds = time.process_time() - began
    ends = [judging.recovered(plan, full).after[-1].score for plan in plans]
    seen = selected.recovered
    columns = [[r.predicted for r in seen], [r.before.score for r in seen], [r.after[0].score for r in seen]]
    ranks = [f"{spearmanr(column, ends).statistic:.2f}" for column in columns]
    number = next(n for n, recovered in enumerate(seen) if recovered.chosen)
    errors = [ends[0], ends[number], min(ends), sum(ends) / len(ends)]
    return [name, str(choosing.seed), str(len(plans)), *(f"{e:.4f}" for e in errors), *ranks, f"{seconds:.0f}"]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--budgets", default="|".join(BUDGETS), help="separated by |")
    parser.add_argument("--plans", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="of the short recovery")
    parser.add_argument("--full", type=int, default=240, help="output steps of training in full")
    parser.add_argument("--stage", default="output", help="of the short recovery: local, carried or output")
    parser.add_argument("--seeds", default="0")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = for_model(given.model, load_config(given.config, []))
    pipeline = load_pipeline(given.model, torch.device("cpu"))
    train, held_out = (States(given.run / "calibration", split) for split in ("train", "held-out"))
    scale = guidance_weight(pipeline, config.capture)
    choosing, judging = (Judge(pipeline.transformer, half, train, len(half), scale) for half in held_out.halves())
    analysis, candidates = load_artifact(Analysis, given.run / "analysis.json"), load_candidates(given.run)
    rows = []
    for seed in map(int, given.seeds.split(",")):
        for name in given.budgets.split("|"):
            settings = PlanConfig(**{**BUDGETS[name], "recover": given.plans, "recover_stage": given.stage})
            plans = best_plans(analysis, candidates, settings, given.plans)
            asked = {way: config.model_copy(update={"plan": settings.model_copy(update={"recover_stage": way})})
                     for way in (given.stage, "output")}  # fmt: skip
            folder = given.run.parent / f"{given.run.name}-recover" / str(seed)
            common = (pipeline.transformer, adapter_for(pipeline.transformer), given.run)
            short = Choice(*common, folder / given.stage, asked[given.stage].recovery, given.steps, seed, choosing)
            whole = Choice(*common, folder / "full", asked["output"].recovery, given.full, seed, judging)
            rows.append(row_of(name, plans, short, whole, given.full))
            print(rows[-1], flush=True)
    command = (
        f"python benchmarks/recover.py RUN {given.out} --budgets '{given.budgets}' --plans {given.plans} --steps "
        f"{given.steps} --full {given.full} --stage {given.stage} --seeds {given.seeds}"
    )
    text = (
        f"# Selecting plans by recovery, {given.model}\n\nWritten by `{command}`. The planner's best plans of each "
        f"budget recover for {given.steps} steps ({given.stage} stage, substitutes alone), the best two three times "
        "as many, and one is selected by half of the held-out prompts. All are then trained for "
        f"{given.full} output steps and judged by the other half. Errors: geometric mean of the relative errors of the "
        f"guided velocity and of the caption's difference.\n\n{markdown_table(HEADER, rows)}\n"
    )
    write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
