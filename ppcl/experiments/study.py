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

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.probes import chained_probe
from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.devices import autocast
from ppcl.common.files import digest, read_mapping, write_json, write_text
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import read_tensors
from ppcl.config.memory import changed, for_tables
from ppcl.distill.trainer import Distiller
from ppcl.eval.intervals import Interval
from ppcl.eval.velocity import error_interval
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
from ppcl.pruning.planner import cost_of, is_allowed, optimal_ladder
from ppcl.run import Session
from ppcl.student.assembly import LinearRun, assemble_student, with_blocks
from ppcl.student.bundle import load_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter
from ppcl.teacher.velocity import VelocityErrors

SIZES = (2, 3, 4, 5, 6)
FORMS = ("skipped", "probes")
SEQUENCES = ("non-sequential", "sequential")
Position = tuple[str, int]
Removal = tuple[Position, ...]


class VelocityMeter:
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
            self.targets = [velocity(transformer, batch) for batch in self.batches]

    @torch.no_grad()
    def _errors(self, student: nn.Module) -> VelocityErrors:
        errors = VelocityErrors()
        for batch, target in zip(self.batches, self.targets, strict=True):
            with autocast(self.device, self.precision):
                output = velocity(student, batch)
            errors.add(target, output)
        return errors

    def error(self, student: nn.Module) -> float:
        """Relative velocity error of a student."""
        return self._errors(student).relative

    def interval(self, student: nn.Module) -> Interval:
        """The same with its bootstrap interval over states."""
        return error_interval(*self._errors(student).by_state().numpy())


def removable(session: Session) -> list[list[Position]]:
    """Blocks of each stack that may go, in order; the protected first and last ones stay."""
    settings, stacks = session.config.plan, []
    specs = session.adapter.stacks
    for number, spec in enumerate(specs):
        count = len(session.adapter.blocks(session.transformer, spec))
        low = settings.protect_first if number == 0 else 0
        high = count - (settings.protect_last if number == len(specs) - 1 else 0)
        stacks.append([(spec.name, index) for index in range(low, high)])
    return stacks


def contiguous_removals(stacks: Sequence[Sequence[Position]], size: int, draws: int, seed: int) -> list[Removal]:
    """Runs of ``size`` neighbouring blocks, all different; all there are if ``draws`` is larger."""
    every = [tuple(blocks[i : i + size]) for blocks in stacks for i in range(len(blocks) - size + 1)]
    order = torch.randperm(len(every), generator=step_generator(seed, size, Stream.CONTIGUOUS_REMOVALS)).tolist()
    return sorted(every[i] for i in order[:draws])


def scattered_removals(stacks: Sequence[Sequence[Position]], size: int, draws: int, seed: int) -> list[Removal]:
    """Sets of ``size`` blocks of which no two are neighbours, all different; fewer if there are not so many."""
    blocks = [position for stack in stacks for position in stack]
    generator = step_generator(seed, size, Stream.SCATTERED_REMOVALS)
    removals: set[Removal] = set()
    for _ in range(500 * draws):
        if len(removals) == draws or size > len(blocks):
            break
        picked = sorted(torch.randperm(len(blocks), generator=generator)[:size].tolist())
        removal = tuple(blocks[i] for i in picked)
        if all(a[0] != b[0] or b[1] - a[1] > 1 for a, b in pairwise(removal)):
            removals.add(removal)
    return sorted(removals)


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


def study_contiguity(session: Session, meter: VelocityMeter, draws: int) -> list[dict[str, Any]]:
    """(a) Errors of contiguous and of scattered removals, by number of blocks and by what takes their place.

    Returns:
        The fields of :class:`ppcl.experiments.study_text.Comparison`, one row a size and form.
    """
    transformer, adapter, seed = session.transformer, session.adapter, session.config.seed
    probes = read_tensors(session.out / "analysis.safetensors", str(session.device))[0]
    stacks = removable(session)
    drawn = {
        size: (contiguous_removals(stacks, size, draws, seed), scattered_removals(stacks, size, draws, seed))
        for size in SIZES
    }
    drawn = {size: pair for size, pair in drawn.items() if all(pair)}
    total = len(FORMS) * sum(len(a) + len(b) for a, b in drawn.values())
    rows = []
    with Progress("study: removals", total=total) as progress:

        def errors(removals: Sequence[Removal], form: str) -> list[float]:
            maps = probes if form == "probes" else None
            values = [meter.error(without_blocks(transformer, adapter, removal, maps)) for removal in removals]
            progress.advance(len(removals))
            return values

        for form in FORMS:
            for size, (together, apart) in drawn.items():
                row = {"contiguous": errors(together, form), "scattered": errors(apart, form)}
                rows.append({"form": form, "size": size, **row})
    return rows


def study_sequence(
    session: Session, meter: VelocityMeter, plan: CompressionPlan, seeds: Sequence[int]
) -> dict[str, Any]:
    """(b) Local distillation of one plan in both ways: errors and seconds of training by training seed."""
    transformer, adapter = session.transformer, session.adapter
    with torch.no_grad():
        start = assemble_student(transformer, adapter, plan, new_substitutes(transformer, adapter, plan, None))
        result: dict[str, Any] = {"before": meter.error(start), "steps": session.config.distill.local_steps}
    for sequence in SEQUENCES:
        # what sequential training cannot do
        alike = {"one_at_a_time": False, "release_gradients": "auto", "shard": False}
        how = {"sequence": sequence, "output_steps": 0, "from_fit": False, "train": "substitutes"}
        settings = changed(session.config.distill, **alike, **how)
        rows = []
        for seed in seeds:
            # the digest is in the folder's name: an interrupted training of other settings is not resumed
            made_of = digest(session.depends("fit"), to_jsonable(plan.stacks), settings.identity(), seed)
            folder = session.out / "study" / sequence / f"seed-{seed}" / made_of
            times: list[float] = []
            if not (folder / "bundle").is_dir():
                Distiller(
                    transformer,
                    adapter,
                    plan,
                    session.calibration,
                    folder,
                    settings,
                    seed,
                    session.config.precision,
                    lambda row, times=times: times.append(row["seconds"]),  # type: ignore[misc]
                ).run()
                write_json(
                    folder / "seconds.json", {"median_step_seconds": statistics.median(times) if times else None}
                )
            bundle = load_bundle(folder / "bundle", transformer, adapter)
            error = meter.error(assemble_student(transformer, adapter, bundle.plan, bundle.substitutes))
            seconds = folder / "seconds.json"
            rows.append(
                {"error": error, **(read_mapping(seconds) if seconds.is_file() else {"median_step_seconds": None})}
            )
        result[sequence] = rows
    return result


def study_squares(session: Session, meter: VelocityMeter) -> list[dict[str, Any]]:
    """(c) For every size of plan: predicted error by squares and by plain sum, against the measured one.

    The plans are the planner's own; every run holds its fitted candidate, nothing is trained further.
    """
    analysis, candidates = session.read(Analysis, "analysis.json"), session.candidates
    fitted = [
        c
        for c in candidates.candidates
        if c.fitted_error is not None and is_allowed(analysis.model, c, session.config.plan)
    ]
    costs = {(c.stack, c.first, c.last): c for c in fitted}
    rows = []
    for runs in optimal_ladder(analysis.model, fitted):
        if not runs:
            continue
        plan = plan_from_runs(analysis.model, runs, OURS, candidates)
        errors = [cost_of(costs[key]) ** 0.5 for key in run_keys(plan)]
        measured = meter.interval(fitted_student(session, plan))
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


def fitted_student(session: Session, plan: CompressionPlan) -> Any:
    """A plan's student with the fitted candidates put in, and plain starts where a run was not fitted."""
    transformer, adapter = session.transformer, session.adapter
    substitutes = new_substitutes(transformer, adapter, plan, session.out / "candidates.safetensors")
    return assemble_student(transformer, adapter, plan, substitutes)


def study_planner(session: Session, meter: VelocityMeter, plans: Mapping[str, CompressionPlan]) -> list[dict[str, Any]]:
    """(d) Predicted and measured error of each criterion's plan of equal size, undistilled."""
    candidates = session.candidates.candidates
    fitted = {(c.stack, c.first, c.last) for c in candidates if c.fitted_error is not None}
    rows = []
    for mode, plan in plans.items():
        keys = run_keys(plan)
        plain = assemble_student(
            session.transformer,
            session.adapter,
            plan,
            new_substitutes(session.transformer, session.adapter, plan, None),
        )
        fit_start, plain_start = meter.interval(fitted_student(session, plan)), meter.interval(plain)
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


def kept(session: Session, name: str, inputs: Any, part: Callable[[], Any]) -> Any:
    """Return the result of a part from ``RUN/study/<name>.json``, or work it out and keep it there."""
    path, made_of = session.out / "study" / f"{name}.json", digest(session.depends("fit"), inputs)
    if path.is_file() and (record := read_mapping(path)).get("digest") == made_of:
        return record["result"]
    result = part()
    write_json(path, {"digest": made_of, "result": result})
    return result


def study(session: Session, table: Path | None = None, draws: int = 12, seeds: Sequence[int] = (0, 1)) -> str:
    """Test the paper's observations on this run's teacher; write ``RUN/study/table.md|json``.

    Args:
        session: Of a run whose fit stage is done.
        table: A further place for the Markdown text.
        draws: Random removals of each size and kind.
        seeds: Training seeds of (b).

    Returns:
        The Markdown text.

    Raises:
        UserError: The budget of the plan cannot be met, or an artifact is damaged.
    """
    session.keep_whole()
    session = session.with_config(for_tables(session.config))
    held_out = States(session.calibration, "held-out")
    count, costs = session.config.evaluate.velocity_states, session.config.fit.eval_states
    analysis, candidates = session.read(Analysis, "analysis.json"), session.candidates
    plans, notes = plans_of_equal_size(analysis, candidates, session.config.plan)
    plans = {mode: with_starts(session, plan) for mode, plan in plans.items()}
    meter = VelocityMeter(session.transformer, list(held_out.batches(count, count)), session.config.precision)
    # the costs behind a prediction were measured on these states: no difference comes from the choice of states
    cost_meter = VelocityMeter(session.transformer, list(held_out.batches(costs, costs)), session.config.precision)
    parts: dict[str, Callable[[], Any]] = {
        "contiguity": lambda: study_contiguity(session, meter, draws),
        "sequence": lambda: study_sequence(session, meter, plans[OURS], seeds),
        "squares": lambda: study_squares(session, cost_meter),
        "planner": lambda: study_planner(session, cost_meter, plans),
    }
    config = session.config
    inputs = {  # beyond what the fit stage depends on
        "contiguity": [config.plan.model_dump(), count, draws],
        "sequence": [to_jsonable(plans[OURS].stacks), config.distill.identity(), count, list(seeds)],
        "squares": [config.plan.model_dump()],
        "planner": [{mode: to_jsonable(plan.stacks) for mode, plan in plans.items()}],
    }
    results = {name: kept(session, name, inputs[name], part) for name, part in parts.items()}
    name = Path(session.model).name if Path(session.model).is_dir() else session.model
    states = sum(map(len, meter.targets))
    info = {"model": name, "states": states, "seeds": tuple(seeds), "notes": list(notes.values())}
    text = write_up(results, info, session.command, str(session.device))
    write_json(session.out / "study" / "table.json", to_jsonable({**results, **info}))
    for path in filter(None, (session.out / "study" / "table.md", table)):
        write_text(path, text)
    return text
