"""The paper's ablation on one teacher: one ingredient more in every row, the same number of training steps.

The first row needs no probe: runs of blocks whose states stay alike (plain CKA above a threshold), and sequential
distillation. Then come the linear probes of eqs. 4-5, non-sequential distillation, the width options one after
another, and the two stages that the local one is followed by. Rows of depth alone stand at a larger size than rows
with width, as in the paper's table (14B, 12B, 10B of 20B).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.cka import linear_cka
from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.files import write_json, write_text
from ppcl.common.tables import INTERVALS, markdown_table, measured, number, provenance, spread
from ppcl.config import DistillConfig, PlanConfig
from ppcl.config.memory import changed, for_tables
from ppcl.errors import UserError
from ppcl.experiments.baselines import nearest_rung, plan_from_runs, removed_blocks, run_keys, with_starts
from ppcl.experiments.compare import Judge, run_row
from ppcl.experiments.compare_text import MEASURES, Row
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import Runs, free_blocks, paper_ladder, plan
from ppcl.run import Run
from ppcl.run.summary import describe_plan
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import Adapter
from ppcl.teacher.model_info import ModelInfo
from ppcl.teacher.trace import BlockCall, run_traced

CKA_STATES = 32
CKA_TOKENS = 1024
DEPTH_SHARE, TEXT_SHARE = 0.6, 0.8  # of what is to be saved, by depth alone and with the text stream, as in the paper
NEEDED = ("text", "ffn", "modulation")


@torch.no_grad()
def state_cka(
    transformer: torch.nn.Module, adapter: Adapter, arguments: Mapping[str, Any], tokens: int = CKA_TOKENS
) -> dict[str, list[list[float]]]:
    """CKA between what enters block u and what leaves block k, for every stack and u <= k; no probes.

    Args:
        transformer: The teacher.
        adapter: Its family.
        arguments: A batch of states.
        tokens: At most so many of each stream, evenly spread.

    Returns:
        By stack an M x M table (0 for k < u), streams averaged by their number of tokens.
    """
    states: dict[str, dict[str, list[Tensor]]] = {spec.name: {} for spec in adapter.stacks}
    sizes: dict[str, dict[str, int]] = {spec.name: {} for spec in adapter.stacks}

    def rows(state: Tensor) -> Tensor:
        flat = state.flatten(0, 1)
        return flat[:: max(1, len(flat) // tokens)].float().cpu()

    def visit(call: BlockCall) -> None:
        kept = states[call.stack.name]
        for stream, state in call.outputs.items():
            if stream not in kept:
                kept[stream] = [rows(call.inputs[stream])]
                sizes[call.stack.name][stream] = state.shape[1]
            kept[stream].append(rows(state))

    run_traced(transformer, adapter, dict(arguments), visit)
    tables = {}
    for name, streams in states.items():
        total = sum(sizes[name].values())
        count = len(next(iter(streams.values()))) - 1
        table = [[0.0] * count for _ in range(count)]
        for u, k in itertools.combinations_with_replacement(range(count), 2):
            table[u][k] = sum(sizes[name][s] / total * linear_cka(h[u], h[k + 1]) for s, h in streams.items())
        tables[name] = table
    return tables


def threshold_ladder(
    model: ModelInfo, tables: Mapping[str, Sequence[Sequence[float]]], settings: PlanConfig
) -> list[Runs]:
    """Runs of alike states for every threshold, from the strictest on.

    From each start u the run goes on while CKA(u, k) stays above the threshold; runs do not overlap.
    """
    values = sorted({v for table in tables.values() for row in table for v in row if v > 0}, reverse=True)
    ladder: list[Runs] = [()]
    for threshold in values:
        runs: list[tuple[str, int, int]] = []
        for stack in model.stacks:
            first, end = free_blocks(model, stack, settings)
            while first < end - 1:
                last = first
                while last + 1 < end and tables[stack.name][first][last + 1] >= threshold:
                    last += 1
                if last > first:
                    runs.append((stack.name, first, last))
                first = last + 1
        if tuple(runs) != ladder[-1]:
            ladder.append(tuple(runs))
    return ladder


def with_fixed_depth(
    analysis: Analysis, candidates: Candidates, depth: CompressionPlan, groups: Sequence[str], keep: float
) -> CompressionPlan:
    """A plan's runs, with smaller modules of some groups beside them until a share of the parameters is met.

    Raises:
        BudgetError: These modules do not save that much.
    """
    runs = set(run_keys(depth))
    taken = tuple(
        dataclasses.replace(c, fitted_error=0.0)  # costs nothing, so the planner keeps it
        for c in candidates.candidates
        if (c.stack, c.first, c.last) in runs
    )
    settings = PlanConfig(mode="optimal", keep=keep, width=tuple(groups), protect_first=0, protect_last=0)  # type: ignore[call-arg, arg-type]
    return plan(analysis, dataclasses.replace(candidates, candidates=taken), settings)


def ablation_rows(run: Run) -> list[Row]:
    """The rows, each with one ingredient more than the one before.

    Raises:
        UserError: Width options were not measured.
        BudgetError: A row's size cannot be reached.
    """
    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    measured = {option.group.split(".")[0] for option in candidates.width}
    if lacking := [group for group in NEEDED if group not in measured]:
        raise UserError(
            f"the ablation needs width options that were not measured: {', '.join(lacking)}; "
            f"run it with --set fit.width=[{','.join(NEEDED)}], or on a family that has them"
        )
    settings, model = run.config.plan, analysis.model
    keep = settings.keep or 0.5
    known = {(c.stack, c.first, c.last): c for c in candidates.candidates}
    paper = paper_ladder(analysis, known, settings)
    depth_keep = 1 - DEPTH_SHARE * (1 - keep)
    rungs = [plan_from_runs(model, runs, "paper", candidates) for runs in paper]
    depth = min(rungs, key=lambda rung: abs(rung.predicted.param_ratio - depth_keep))
    states = next(States(run.out / "calibration", "held-out").batches(CKA_STATES, CKA_STATES))
    tables = state_cka(run.teacher.transformer, run.adapter, states)
    alike = nearest_rung(threshold_ladder(model, tables, settings), removed_blocks(run_keys(depth)))
    threshold = with_starts(run, plan_from_runs(model, alike, "threshold", candidates))
    depth = with_starts(run, depth)

    def wider(groups: Sequence[str], share: float) -> CompressionPlan:
        return with_starts(run, with_fixed_depth(analysis, candidates, depth, groups, share))

    text, ffn = wider(("text",), 1 - TEXT_SHARE * (1 - keep)), wider(("text", "ffn"), keep)
    every = wider(NEEDED, keep)
    stages = _stages(run.config.distill)
    return [
        Row("ablation-1-threshold", "CKA threshold, sequential distillation", threshold, stages["sequential"]),
        Row("ablation-2-probe", "+ linear probe (eqs. 4-5)", depth, stages["sequential"]),
        Row("ablation-3-non-sequential", "+ non-sequential distillation", depth, stages["local"]),
        Row("ablation-4-text", "+ text stream (eq. 8)", text, stages["local"]),
        Row("ablation-5-ffn", "+ FFN (eq. 9)", ffn, stages["local"]),
        Row("ablation-6-modulation", "+ low-rank modulation", every, stages["local"]),
        Row("ablation-7-alternating", "+ alternating stage", every, stages["alternating"]),
        Row("ablation-8-output", "+ output stage, all weights", every, stages["output"]),
    ]


def _stages(settings: DistillConfig) -> dict[str, DistillConfig]:
    """Settings of the rows: one number of steps, split over the stages that a row has."""
    total = settings.local_steps + settings.alternating_steps + settings.output_steps
    third = total // 3

    def split(local: int, alternating: int, output: int, **more: Any) -> DistillConfig:
        steps = {"local_steps": local, "alternating_steps": alternating, "output_steps": output}
        # rows differ in one thing, and the sequential ones can do neither
        alike = {"from_fit": False, "one_at_a_time": False, "release_gradients": "auto"}
        return changed(settings, **{**alike, **steps, **more})

    return {
        "sequential": split(total, 0, 0, sequence="sequential"),
        "local": split(total, 0, 0),
        "alternating": split(total - third, third, 0),
        "output": split(total - 2 * third, third, third),
    }


def ablate(run: Run, table: Path | None = None, seeds: Sequence[int] | None = None) -> str:
    """Train and score all rows; resumable.

    Writes ``RUN/compare/ablation-*`` (bundle, pictures, metrics.json) and ``RUN/compare/ablation.md|json``.

    Args:
        run: The run; capture, analyze and fit are done first if they are not. ``plan.keep`` is the size of the rows
            with all width options.
        table: A further place for the Markdown table.
        seeds: Training seeds; the run's own if None.

    Returns:
        The Markdown text.

    Raises:
        UserError: Width options were not measured, or the budget cannot be met.
    """
    for stage in ("capture", "analyze", "fit"):
        run.run(stage)
    run.config = for_tables(run.config)
    chosen = tuple(seeds or (run.config.seed,))
    rows = ablation_rows(run)
    judge = Judge(run)
    teacher = judge.teacher()
    results = [(row, [run_row(run, judge, row, seed, teacher) for seed in chosen]) for row in rows]
    text = write_up(run, teacher, results, chosen)
    data = {row.name: {"plan": to_jsonable(row.plan.stacks), "seeds": metrics} for row, metrics in results}
    write_json(run.out / "compare" / "ablation.json", {"teacher": teacher, "rows": data})
    for path in filter(None, (run.out / "compare" / "ablation.md", table)):
        write_text(path, text)
    return text


Results = Sequence[tuple[Row, Sequence[Mapping[str, Any]]]]


def write_up(run: Run, teacher: Mapping[str, Any], results: Results, seeds: Sequence[int]) -> str:
    """The ablation as Markdown."""
    settings, model = run.config.distill, results[0][0].plan.model
    header = ["", "parameters", "share", "speed-up (predicted)", "velocity error before training", "after"]
    header += ["FID", "CLIP score", "retrieval@1", "retrieval@5", "average drop, %"]
    own = [spread([seed[name] for seed in teacher["seeds"]]) for name in MEASURES]
    lines = [["teacher", f"{model.params:,}", "100%", "1.00", "0", "0", *own]]
    for row, metrics in results:
        params = metrics[0]["params"]
        size = [f"{params:,}", f"{params / model.params:.1%}", f"{row.plan.predicted.speedup:.2f}"]
        errors = [number(metrics[0]["velocity_error_before"]), measured(metrics, "velocity_error")]
        lines.append([row.label, *size, *errors, *(measured(metrics, name) for name in MEASURES)])
    total = settings.local_steps + settings.alternating_steps + settings.output_steps
    reading = (
        f"Every row adds one ingredient to the row before it and has {total} training steps of {settings.batch_size} "
        f"states in all (training seeds {', '.join(map(str, seeds))}); where a row has several stages they share these "
        f"steps. {len(run.evaluation_prompts)} prompts, features: {teacher['features']}, FID against "
        f"{teacher['fid_reference']}; the teacher's row is the mean ± standard deviation over {len(teacher['seeds'])} "
        "seeds of pictures, and the drop is against that mean. Velocity errors are relative, on held-out states. "
        f"{INTERVALS}"
    )
    plans = "\n".join(f"* {row.label}: {describe_plan(row.plan)}" for row, _ in results)
    parts = ["# The paper's ablation", markdown_table(header, lines), reading, steps_taken(results), plans]
    return "\n\n".join([*parts, provenance(run.command, str(run.device))]) + "\n"


def steps_taken(results: Results) -> str:
    """What each ingredient changed, in words computed from the numbers."""
    lines = []
    for (_, first), (after, second) in itertools.pairwise(results):
        a, b = (sum(m["velocity_error"] for m in each) / len(each) for each in (first, second))
        smaller = second[0]["params"] < first[0]["params"]
        size = f", at {second[0]['params'] / first[0]['params'] - 1:+.1%} parameters" if smaller else ""
        name = after.label.removeprefix("+ ")
        lines.append(f"* {name}: velocity error {number(a)} to {number(b)} ({b / a - 1:+.0%}){size}.")
    return "\n".join(lines)
