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
from ppcl.common.tables import number
from ppcl.config import DistillConfig, PlanConfig
from ppcl.config.memory import UNTRAINED, changed
from ppcl.errors import UserError
from ppcl.experiments.baselines import nearest_rung, plan_from_runs, removed_blocks, run_keys, with_starts
from ppcl.experiments.noise import READING, difference
from ppcl.experiments.runner import MEASURES, Results, Row, RowRunner
from ppcl.experiments.tables import as_json, finish, measured_with, row_cells, table, teacher_cells
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import Runs, paper_ladder, plan
from ppcl.run import Session
from ppcl.run.summary import describe_plan
from ppcl.student.plan import CompressionPlan, free_blocks
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import Adapter
from ppcl.teacher.families.masks import valid_tokens
from ppcl.teacher.model_info import ModelInfo
from ppcl.teacher.trace import BlockCall, run_traced

CKA_STATES = 32
CKA_TOKENS = 1024
DEPTH_SHARE, TEXT_SHARE = 0.6, 0.8  # of what is to be saved, by depth alone and with the text stream, as in the paper
COLUMNS = ("params", "share", "speedup", "before", "velocity_error", *MEASURES)
NEEDED = ("text", "ffn", "modulation")


@torch.no_grad()
def state_cka(
    transformer: torch.nn.Module, adapter: Adapter, batches: Sequence[dict[str, Any]], tokens: int = CKA_TOKENS
) -> dict[str, list[list[float]]]:
    """CKA between what enters block u and what leaves block k, for every stack and u <= k; no probes.

    Args:
        transformer: The teacher.
        adapter: Its family.
        batches: Of states.
        tokens: About so many of each stream, as many of each state; padding is left out.

    Returns:
        By stack an M x M table (0 for k < u), streams averaged by their number of tokens.
    """
    states: dict[str, dict[str, dict[int, list[Tensor]]]] = {spec.name: {} for spec in adapter.stacks}
    sizes: dict[str, dict[str, int]] = {spec.name: {} for spec in adapter.stacks}
    quota = max(1, tokens // sum(map(batch_size, batches)))

    def visit(call: BlockCall) -> None:
        name = call.stack.name
        masks = valid_tokens(call.stack, call.arguments)
        for stream, state in call.outputs.items():
            valid = masks[stream] if stream in masks else torch.ones(state.shape[:2], dtype=torch.bool)
            tokens = _evenly(valid.cpu(), quota)
            levels = states[name].setdefault(stream, {})
            if call.index == 0:
                sizes[name][stream] = sizes[name].get(stream, 0) + int(valid.sum())
                levels.setdefault(0, []).append(_picked(call.inputs[stream], tokens))
            levels.setdefault(call.index + 1, []).append(_picked(state, tokens))

    for arguments in batches:
        run_traced(transformer, adapter, arguments, visit)
    tables = {}
    for name, streams in states.items():
        total = sum(sizes[name].values())
        whole = {stream: [torch.cat(parts) for parts in levels.values()] for stream, levels in streams.items()}
        count = len(next(iter(whole.values()))) - 1
        table = [[0.0] * count for _ in range(count)]
        for u, k in itertools.combinations_with_replacement(range(count), 2):
            table[u][k] = sum(sizes[name][s] / total * linear_cka(h[u], h[k + 1]) for s, h in whole.items())
        tables[name] = table
    return tables


def _picked(states: Tensor, numbers: Tensor) -> Tensor:
    return states.flatten(0, 1)[numbers.to(states.device)].float().cpu()


def _evenly(valid: Tensor, quota: int) -> Tensor:
    """Numbers, in all of a batch, of ``quota`` valid tokens of each state, the first one later in each state.

    Args:
        valid: (B, tokens) bool.
        quota: All valid ones, where there are fewer.
    """
    picked = []
    for row, valid_of_state in enumerate(valid):
        places = valid_of_state.nonzero()[:, 0]
        step = max(1, len(places) // quota)
        picked.append(places[row % step :: step][:quota] + row * valid.shape[1])
    return torch.cat(picked)


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
        dataclasses.replace(c, fitted_error=0.0)  # costs nothing and adds to no other cost, so the planner keeps it
        for c in candidates.candidates
        if (c.stack, c.first, c.last) in runs
    )
    settings = PlanConfig(mode="optimal", keep=keep, width=tuple(groups), protect_first=0, protect_last=0)  # type: ignore[call-arg, arg-type]
    smaller = {option.name for option in candidates.width}
    vectors = {name: vector for name, vector in candidates.vectors.items() if name in smaller}
    return plan(analysis, dataclasses.replace(candidates, candidates=taken, vectors=vectors), settings)


def ablation_rows(session: Session) -> list[Row]:
    """The rows, each with one ingredient more than the one before.

    Raises:
        UserError: Width options were not measured.
        BudgetError: A row's size cannot be reached.
    """
    analysis, candidates = session.read(Analysis, "analysis.json"), session.candidates
    measured = {option.family for option in candidates.width}
    if lacking := [group for group in NEEDED if group not in measured]:
        raise UserError(
            f"the ablation needs width options that were not measured: {', '.join(lacking)}; "
            f"run it with --set fit.width=[{','.join(NEEDED)}], or on a family that has them"
        )
    settings, model = session.config.plan, analysis.model
    keep = settings.keep or 0.5
    costs = {(c.stack, c.first, c.last): c for c in candidates.candidates}
    paper = paper_ladder(analysis, costs, settings)
    depth_keep = 1 - DEPTH_SHARE * (1 - keep)
    rungs = [plan_from_runs(model, runs, "paper", candidates) for runs in paper]
    depth = min(rungs, key=lambda rung: abs(rung.predicted.param_ratio - depth_keep))
    states = States(session.calibration, "held-out").batches(CKA_STATES, CKA_STATES)
    tables = state_cka(session.transformer, session.adapter, list(states))
    alike = nearest_rung(threshold_ladder(model, tables, settings), removed_blocks(run_keys(depth)))
    threshold = with_starts(session, plan_from_runs(model, alike, "threshold", candidates))
    depth = with_starts(session, depth)

    def wider(groups: Sequence[str], share: float) -> CompressionPlan:
        return with_starts(session, with_fixed_depth(analysis, candidates, depth, groups, share))

    text, ffn = wider(("text",), 1 - TEXT_SHARE * (1 - keep)), wider(("text", "ffn"), keep)
    every = wider(NEEDED, keep)
    stages = _stages(session.config.distill)
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
        return changed(settings, **{**UNTRAINED, **alike, **steps, **more})

    return {
        "sequential": split(total, 0, 0, sequence="sequential"),
        "local": split(total, 0, 0),
        "alternating": split(total - third, third, 0),
        "output": split(total - 2 * third, third, third),
    }


def ablate(session: Session, place: Path | None = None, seeds: Sequence[int] | None = None) -> str:
    """Train and score all rows; resumable.

    Writes ``RUN/compare/ablation-*`` (bundle, pictures, metrics.json) and ``RUN/compare/ablation.md|json``.

    Args:
        session: Of a run whose fit stage is done. ``plan.keep`` is the size of the rows with all width options.
        place: A further place for the Markdown table.
        seeds: Training seeds; the run's own if None.

    Returns:
        The Markdown text.

    Raises:
        UserError: Width options were not measured, or the budget cannot be met.
    """
    runner = RowRunner(session)
    training_seeds = tuple(seeds or (session.config.seed,))
    results = runner.run_all(ablation_rows(runner.session), training_seeds)
    settings, model = runner.session.config.distill, results[0][0].plan.model
    lines = {"teacher": teacher_cells(model.params, runner.teacher_scores)}
    lines |= {row.label: row_cells(row.plan, metrics) for row, metrics in results}
    total = settings.local_steps + settings.alternating_steps + settings.output_steps
    reading = (
        f"Every row adds one ingredient to the row before it and has {total} training steps of {settings.batch_size} "
        f"states in all (training seeds {', '.join(map(str, training_seeds))}); where a row has several stages they "
        f"share these steps. {measured_with(runner)} {READING}"
    )
    plans = "\n".join(f"* {row.label}: {describe_plan(row.plan)}" for row, _ in results)
    parts = ["# The paper's ablation", table(COLUMNS, lines), reading, steps_taken(results), plans]
    return finish(session, "ablation", parts, as_json(runner, results), place)


def steps_taken(results: Results) -> str:
    """What each ingredient changed, in words computed from the numbers."""
    lines = []
    for (_, first), (after, second) in itertools.pairwise(results):
        a, b = (sum(m["velocity_error"] for m in each) / len(each) for each in (first, second))
        smaller = second[0]["params"] < first[0]["params"]
        size = f", at {second[0]['params'] / first[0]['params'] - 1:+.1%} parameters" if smaller else ""
        name = after.label.removeprefix("+ ")
        text = f"* {name}: velocity error {number(a)} to {number(b)} ({b / a - 1:+.0%})"
        if gap := difference(first, second, "average_drop"):
            told = "told apart" if gap.is_told_apart else "not told apart"
            text += f", drop {gap.value:+.2f} points ({told}; {gap})"
        lines.append(f"{text}{size}.")
    return "\n".join(lines)
