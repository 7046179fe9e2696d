"""The paper's observations, tested on this teacher: four tables and what comes out of them.

(a) Is removing contiguous blocks cheaper than removing as many scattered ones?
(b) Is non-sequential distillation better than sequential distillation of the same plan?
(c) Do squared errors of single substitutes add up to the squared error of the whole plan?
(d) Do the planner's predictions order the criteria as the measurement does?

All errors are relative velocity errors on held-out states.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.probes import chained_probe
from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.devices import autocast
from ppcl.common.files import digest, read_json, read_tensors, write_json, write_text
from ppcl.common.progress import Progress
from ppcl.common.streams import step_generator
from ppcl.config.memory import changed, for_tables
from ppcl.distill.trainer import Distiller
from ppcl.eval.intervals import Interval
from ppcl.eval.velocity import StateErrors
from ppcl.experiments.baselines import (
    BASELINES,
    OURS,
    plan_from_runs,
    plans_of_equal_size,
    removed_blocks,
    run_keys,
    with_starts,
)
from ppcl.experiments.study_text import write_up
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import cost_of, is_allowed, optimal_ladder
from ppcl.run import Run
from ppcl.student.assembly import LinearRun, assemble_student, with_blocks
from ppcl.student.bundle import load_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter

SIZES = (2, 3, 4, 5, 6)
FORMS = ("skipped", "probes")
SEQUENCES = ("non-sequential", "sequential")
Position = tuple[str, int]
Removal = tuple[Position, ...]


class Ruler:
    """Measures velocity errors against the teacher, which runs once.

    Args:
        transformer: The teacher's transformer.
        batches: Held-out states.
        precision: Autocast of the passes; substitutes may be float32 where the teacher is not.
    """

    def __init__(self, transformer: nn.Module, batches: Sequence[Mapping[str, Any]], precision: str = "auto") -> None:
        self.device, self.precision = next(transformer.parameters()).device, precision
        self.batches = [to_device(dict(batch), self.device) for batch in batches]
        with torch.no_grad(), autocast(self.device, precision):
            self.targets = [velocity(transformer, batch).double() for batch in self.batches]

    @torch.no_grad()
    def _by_state(self, student: nn.Module) -> StateErrors:
        pairs = list(zip(self.batches, self.targets, strict=True))
        with autocast(self.device, self.precision):
            moved = [(velocity(student, batch).double() - target).pow(2).flatten(1).sum(1) for batch, target in pairs]
        whole = [target.pow(2).flatten(1).sum(1) for target in self.targets]
        columns = [torch.cat(parts).cpu().numpy() for parts in (moved, whole)]
        return StateErrors(np.full(len(columns[0]), np.nan), columns[0], columns[1])

    def error(self, student: nn.Module) -> float:
        """Relative velocity error of a student."""
        found = self._by_state(student)
        return float((found.differences.sum() / found.totals.sum()) ** 0.5)

    def interval(self, student: nn.Module) -> Interval:
        """The same with its bootstrap interval over states."""
        return self._by_state(student).error


def removable(run: Run) -> list[list[Position]]:
    """Blocks of each stack that may go, in order; the protected first and last ones stay."""
    settings, stacks = run.config.plan, []
    specs = run.adapter.stacks
    for number, spec in enumerate(specs):
        count = len(run.adapter.blocks(run.teacher.transformer, spec))
        low = settings.protect_first if number == 0 else 0
        high = count - (settings.protect_last if number == len(specs) - 1 else 0)
        stacks.append([(spec.name, index) for index in range(low, high)])
    return stacks


def contiguous_removals(stacks: Sequence[Sequence[Position]], size: int, draws: int, seed: int) -> list[Removal]:
    """Runs of ``size`` neighbouring blocks, all different; all there are if ``draws`` is larger."""
    every = [tuple(blocks[i : i + size]) for blocks in stacks for i in range(len(blocks) - size + 1)]
    order = torch.randperm(len(every), generator=step_generator(seed, size, 41)).tolist()
    return sorted(every[i] for i in order[:draws])


def scattered_removals(stacks: Sequence[Sequence[Position]], size: int, draws: int, seed: int) -> list[Removal]:
    """Sets of ``size`` blocks of which no two are neighbours, all different; fewer if there are not so many."""
    blocks = [position for stack in stacks for position in stack]
    generator = step_generator(seed, size, 43)
    found: set[Removal] = set()
    for _ in range(500 * draws):
        if len(found) == draws or size > len(blocks):
            break
        picked = sorted(torch.randperm(len(blocks), generator=generator)[:size].tolist())
        chosen = tuple(blocks[i] for i in picked)
        if all(a[0] != b[0] or b[1] - a[1] > 1 for a, b in pairwise(chosen)):
            found.add(chosen)
    return sorted(found)


def without_blocks(
    transformer: nn.Module, adapter: Adapter, removal: Removal, probes: Mapping[str, Tensor] | None
) -> Any:
    """The teacher without some blocks.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        removal: Blocks that go.
        probes: Probe matrices: each maximal removed run becomes its chained probes. None: it is skipped.
    """
    device = next(transformer.parameters()).device
    lists: dict[str, list[nn.Module]] = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        gone = {index for name, index in removal if name == spec.name}
        kept: list[nn.Module] = []
        for index, block in enumerate(blocks):
            if index not in gone:
                kept.append(block)
            elif probes is not None and index - 1 not in gone:
                last = next(i for i in range(index, len(blocks)) if i + 1 not in gone)
                maps = chained_probe(probes, (spec.name, index, last), list(spec.inputs), device)
                kept.append(LinearRun(adapter, spec, block, maps))
        lists[spec.name] = kept
    return with_blocks(transformer, lists)


def study_contiguity(run: Run, ruler: Ruler, draws: int) -> list[dict[str, Any]]:
    """(a) Errors of contiguous and of scattered removals, by number of blocks and by what takes their place.

    Returns:
        The fields of :class:`ppcl.experiments.study_text.Comparison`, one row a size and form.
    """
    transformer, adapter, seed = run.teacher.transformer, run.adapter, run.config.seed
    probes = read_tensors(run.out / "analysis.safetensors", str(run.device))[0]
    stacks = removable(run)
    drawn = {
        size: (contiguous_removals(stacks, size, draws, seed), scattered_removals(stacks, size, draws, seed))
        for size in SIZES
    }
    drawn = {size: pair for size, pair in drawn.items() if all(pair)}
    total = len(FORMS) * sum(len(a) + len(b) for a, b in drawn.values())
    found = []
    with Progress("study: removals", total=total) as progress:

        def errors(removals: Sequence[Removal], form: str) -> list[float]:
            maps = probes if form == "probes" else None
            values = [ruler.error(without_blocks(transformer, adapter, removal, maps)) for removal in removals]
            progress.advance(len(removals))
            return values

        for form in FORMS:
            for size, (together, apart) in drawn.items():
                row = {"contiguous": errors(together, form), "scattered": errors(apart, form)}
                found.append({"form": form, "size": size, **row})
    return found


def study_sequence(run: Run, ruler: Ruler, plan: CompressionPlan, seeds: Sequence[int]) -> dict[str, Any]:
    """(b) Local distillation of one plan in both ways: errors and seconds of training by training seed."""
    transformer, adapter = run.teacher.transformer, run.adapter
    with torch.no_grad():
        start = assemble_student(transformer, adapter, plan, new_substitutes(transformer, adapter, plan, None))
        result: dict[str, Any] = {"before": ruler.error(start), "steps": run.config.distill.local_steps}
    for sequence in SEQUENCES:
        # what sequential training cannot do
        alike = {"one_at_a_time": False, "release_gradients": "auto", "shard": False}
        how = {"sequence": sequence, "output_steps": 0, "from_fit": False, "train": "substitutes"}
        settings = changed(run.config.distill, **alike, **how)
        rows = []
        for seed in seeds:
            # the digest is in the folder's name: an interrupted training of other settings is not resumed
            made_of = digest(run.depends("fit"), to_jsonable(plan.stacks), settings.identity(), seed)
            folder = run.out / "study" / sequence / f"seed-{seed}" / made_of
            times: list[float] = []
            if not (folder / "bundle").is_dir():
                Distiller(
                    transformer,
                    adapter,
                    plan,
                    run.out / "calibration",
                    folder,
                    settings,
                    seed,
                    run.config.precision,
                    lambda row, times=times: times.append(row["seconds"]),  # type: ignore[misc]
                ).run()
                write_json(
                    folder / "seconds.json", {"median_step_seconds": statistics.median(times) if times else None}
                )
            bundle = load_bundle(folder / "bundle", transformer, adapter)
            error = ruler.error(assemble_student(transformer, adapter, bundle.plan, bundle.substitutes))
            seconds = folder / "seconds.json"
            rows.append(
                {"error": error, **(read_json(seconds) if seconds.is_file() else {"median_step_seconds": None})}
            )
        result[sequence] = rows
    return result


def study_squares(run: Run, ruler: Ruler) -> list[dict[str, Any]]:
    """(c) For every size of plan: predicted error by squares and by plain sum, against the measured one.

    The plans are the planner's own; every run holds its fitted candidate, nothing is trained further.
    """
    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    fitted = [
        c
        for c in candidates.candidates
        if c.fitted_error is not None and is_allowed(analysis.model, c, run.config.plan)
    ]
    costs = {(c.stack, c.first, c.last): c for c in fitted}
    rows = []
    for runs in optimal_ladder(analysis.model, fitted):
        if not runs:
            continue
        plan = plan_from_runs(analysis.model, runs, OURS, candidates)
        errors = [cost_of(costs[key]) ** 0.5 for key in run_keys(plan)]
        measured = ruler.interval(fitted_student(run, plan))
        squares = sum(error**2 for error in errors) ** 0.5
        rows.append(
            {
                "removed": removed_blocks(runs),
                "runs": len(runs),
                "squares": squares,
                "sum": sum(errors),
                "measured": measured.value,
                "intervals": {"measured": [measured.low, measured.high]},
            }
        )
    return sorted(rows, key=lambda row: row["removed"])


def fitted_student(run: Run, plan: CompressionPlan) -> Any:
    """A plan's student with the fitted candidates put in, and plain starts where a run was not fitted."""
    transformer, adapter = run.teacher.transformer, run.adapter
    substitutes = new_substitutes(transformer, adapter, plan, run.out / "candidates.safetensors")
    return assemble_student(transformer, adapter, plan, substitutes)


def study_planner(run: Run, ruler: Ruler, plans: Mapping[str, CompressionPlan]) -> list[dict[str, Any]]:
    """(d) Predicted and measured error of each criterion's plan of equal size, undistilled."""
    candidates = run.read(Candidates, "candidates.json").candidates
    fitted = {(c.stack, c.first, c.last) for c in candidates if c.fitted_error is not None}
    rows = []
    for mode, plan in plans.items():
        keys = run_keys(plan)
        plain = assemble_student(
            run.teacher.transformer,
            run.adapter,
            plan,
            new_substitutes(run.teacher.transformer, run.adapter, plan, None),
        )
        fit_start, plain_start = ruler.interval(fitted_student(run, plan)), ruler.interval(plain)
        rows.append(
            {
                "mode": BASELINES.get(mode, mode),
                "removed": removed_blocks(keys),
                "runs": len(keys),
                "fitted": sum(key in fitted for key in keys),
                "predicted": plan.predicted.error,
                "measured": fit_start.value,
                "starts": plain_start.value,
                "intervals": {
                    "measured": [fit_start.low, fit_start.high],
                    "starts": [plain_start.low, plain_start.high],
                },
            }
        )
    return rows


def kept(run: Run, name: str, inputs: Any, part: Callable[[], Any]) -> Any:
    """Return the result of a part from ``RUN/study/<name>.json``, or work it out and keep it there."""
    path, made_of = run.out / "study" / f"{name}.json", digest(run.depends("fit"), inputs)
    if path.is_file() and (known := read_json(path)).get("digest") == made_of:
        return known["result"]
    result = part()
    write_json(path, {"digest": made_of, "result": result})
    return result


def study(run: Run, table: Path | None = None, draws: int = 12, seeds: Sequence[int] = (0, 1)) -> str:
    """Test the paper's observations on this run's teacher; write ``RUN/study/table.md|json``.

    Args:
        run: The run; capture, analyze and fit are done first if they are not.
        table: A further place for the Markdown text.
        draws: Random removals of each size and kind.
        seeds: Training seeds of (b).

    Returns:
        The Markdown text.

    Raises:
        UserError: The budget of the plan cannot be met, or an artifact is damaged.
    """
    for stage in ("capture", "analyze", "fit"):
        run.run(stage)
    run.config = for_tables(run.config)
    held_out = States(run.out / "calibration", "held-out")
    count, costs = run.config.evaluate.velocity_states, run.config.fit.eval_states
    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    plans, notes = plans_of_equal_size(analysis, candidates, run.config.plan)
    plans = {mode: with_starts(run, plan) for mode, plan in plans.items()}
    ruler = Ruler(run.teacher.transformer, list(held_out.batches(count, count)), run.config.precision)
    # the costs behind a prediction were measured on these states: no difference comes from the choice of states
    cost_ruler = Ruler(run.teacher.transformer, list(held_out.batches(costs, costs)), run.config.precision)
    parts: dict[str, Callable[[], Any]] = {
        "contiguity": lambda: study_contiguity(run, ruler, draws),
        "sequence": lambda: study_sequence(run, ruler, plans[OURS], seeds),
        "squares": lambda: study_squares(run, cost_ruler),
        "planner": lambda: study_planner(run, cost_ruler, plans),
    }
    config = run.config
    inputs = {  # beyond what the fit stage depends on
        "contiguity": [config.plan.model_dump(), count, draws],
        "sequence": [to_jsonable(plans[OURS].stacks), config.distill.identity(), count, list(seeds)],
        "squares": [config.plan.model_dump()],
        "planner": [{mode: to_jsonable(plan.stacks) for mode, plan in plans.items()}],
    }
    results = {name: kept(run, name, inputs[name], part) for name, part in parts.items()}
    name = Path(run.model).name if Path(run.model).is_dir() else run.model
    states = sum(map(len, ruler.targets))
    info = {"model": name, "states": states, "seeds": tuple(seeds), "notes": list(notes.values())}
    text = write_up(results, info, run.command, str(run.device))
    write_json(run.out / "study" / "table.json", to_jsonable({**results, **info}))
    for path in filter(None, (run.out / "study" / "table.md", table)):
        write_text(path, text)
    return text
