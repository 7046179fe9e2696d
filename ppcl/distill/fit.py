"""The fit stage: what would it cost to let one block replace this run, or to make a module smaller?

All by sweeps, so that one block of the teacher is in memory at a time. A forward sweep keeps the held-out states at
every block. Another one, over training states, chooses which neurons and heads may go. A backward sweep prices every
smaller module (:mod:`ppcl.pruning.options`) and every run of 2..max_run unprotected blocks by its chained probes. The
most promising runs are then fitted for a few steps, each when a forward sweep has the states at both of its ends, and
what they cost is measured exactly, by carrying the changed states to the velocity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.backward import backward_sweep
from ppcl.analysis.findings import Findings
from ppcl.analysis.prices import CARRIED, Job, Jobs, Price, Prices, exact_costs, read_prices, velocity_norm
from ppcl.analysis.probes import chained_probe
from ppcl.analysis.products import common_vectors
from ppcl.analysis.sweep import Course, forward_sweep
from ppcl.capture.states import Row, States
from ppcl.capture.store import MEMORY, StateStore
from ppcl.common.artifacts import save_artifact
from ppcl.common.devices import autocast
from ppcl.common.files import digest, remove
from ppcl.common.progress import Progress, announce
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import StoredTensors, Unread, read_metadata, read_tensors, write_one_by_one, write_tensors
from ppcl.config import FitConfig, PlanConfig
from ppcl.distill.in_sweep import Ends, Trainees, training_course
from ppcl.pruning.artifacts import VECTORS, Candidate, Candidates
from ppcl.pruning.criteria.draws import draw_states
from ppcl.pruning.fewer_units import KIND, Parts, UnitSums, criterion_cost, scores_of_all, text_blocks
from ppcl.pruning.options import Meter, WidthJobs, width_option
from ppcl.pruning.runs import all_runs, shortlist
from ppcl.pruning.unit_search import CutSite, find_sites
from ppcl.student.assembly import LinearRun, RunKey, in_dtypes_of, run_name, start_block
from ppcl.student.plan import start_index
from ppcl.teacher.blocks import Blocks, Place
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.calls import Call
from ppcl.teacher.trace import record_boundaries
from ppcl.training.distributed import SINGLE, Group, Share
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings


@dataclass(frozen=True)
class Fit:
    """What all parts of the fit stage have in common.

    Attributes:
        source: The teacher's blocks.
        analysis: What the analyze stage found.
        forms: Its matrices by ``stack/block/signal/weight|bias``; each is read when it is asked for.
        train: Training states.
        course: Held-out states behind the costs, with all levels in the store.
        folder: Of sweeps and checkpoints.
        settings: See :class:`FitConfig`.
        seed: Fixes batches, signs and the criterion.
        fingerprint: Of all that the result depends on.
        group: The processes that share the work; the first one writes.
    """

    source: Blocks
    analysis: Analysis
    forms: Mapping[str, Tensor]
    train: States
    course: Course
    folder: Path
    settings: FitConfig
    seed: int
    fingerprint: str
    group: Group

    def store(self, name: str) -> StateStore:
        """A store of states below the stage's folder."""
        memory = MEMORY if self.group.size == 1 else 0
        return StateStore(self.folder / name, self.fingerprint, memory, self.group)

    def training_course(self, name: str, states: States, limit: int | None = None) -> Course:
        """A sweep over training states, all of them if ``limit`` is None."""
        size, precision = self.settings.batch_size, self.course.precision
        common = (self.folder / name, self.fingerprint, {"train": limit}, self.group, precision)
        return training_course(self.source, {"train": states}, size, *common)

    def drawn(self, step: int) -> list[Row]:
        """The batch of a training step, the same for all runs."""
        return self.train.draw(self.settings.batch_size, step_generator(self.seed, step, Stream.FIT_BATCH))

    def file(self, run: RunKey) -> Path:
        """Where the fitted block of a run is."""
        return self.folder / "blocks" / f"{run_name(run).replace('/', '-')}.safetensors"

    def linear(self, run: RunKey) -> Job:
        """A run's chained probes as a job."""
        spec = self.source.stacks[run[0]]

        def make(block: nn.Module) -> nn.Module:
            maps = chained_probe(self.forms, run, list(spec.inputs), self.source.device)
            return LinearRun(self.source.adapter, spec, block, maps)

        return Job(run, make)


def fit(
    source: Blocks,
    analysis: Analysis,
    forms: Mapping[str, Tensor],
    calibration: Path,
    out: Path,
    settings: FitConfig,
    seed: int,
    log: Callable[[dict[str, Any]], None] | None = None,
    group: Group = SINGLE,
    precision: str = "auto",
    protected: PlanConfig | None = None,
    fingerprint: str | None = None,
) -> Candidates:
    """Score candidate runs and smaller modules; write their weights, what they cost, and then ``candidates.json``.

    Files: ``candidates.safetensors`` (fitted blocks), ``width.safetensors`` (closed forms that the analyze stage did
    not know) and ``prices.safetensors`` (a vector for each option, see :mod:`ppcl.analysis.products`).

    Args:
        source: The teacher's blocks.
        analysis: The paper's intervals are always among the fitted runs.
        forms: Matrices by ``stack/block/signal/weight|bias``, as the analyze stage wrote them.
        calibration: The captured states.
        out: The run directory; checkpoints go to ``out/checkpoints/fit``.
        settings: See :class:`FitConfig`.
        seed: Fixes the batches.
        log: Receives one dict a training step.
        group: The processes that share the work; the first one writes.
        precision: Autocast of the passes: substitutes are float32, the teacher may not be.
        protected: Names the protected blocks, which no run takes; those of the default settings if None.
        fingerprint: Of all that the result depends on: what was interrupted goes on where it had the same.
    """
    began = time.perf_counter()
    folder = out / "checkpoints" / "fit"
    if fingerprint is None:
        group.on_main(lambda: remove(folder))
    held_out, train = States(calibration, "held-out"), States(calibration, "train")
    course = training_course(
        source,
        {"held-out": held_out},
        settings.batch_size,
        folder / "held-out",
        fingerprint or "",
        {"held-out": settings.eval_states},
        group,
        precision,
    )
    stage = Fit(source, analysis, forms, train, course, folder, settings, seed, fingerprint or "", group)
    for level in range(len(source.order)):
        course.store.hold(level)
    forward_sweep(course, [])
    runs = all_runs(analysis, settings.max_run, protected or PlanConfig())  # type: ignore[call-arg]
    narrow = narrow_modules(stage, next(held_out.batches(1)), next(train.batches(1)))
    result = replace(_scored(stage, held_out, runs, narrow, log), seconds=time.perf_counter() - began)
    group.on_main(lambda: _write(stage, out, result, narrow))
    course.store.close()
    group.on_main(lambda: remove(folder))
    return result


@dataclass(frozen=True)
class Narrow:
    """What can become smaller inside blocks.

    Attributes:
        jobs: Smaller modules by block.
        findings: Of :class:`ppcl.pruning.fewer_units.UnitSums`; empty where there are neither sites nor texts.
        places: The blocks that have any.
        criterion: What chose units; empty where there are none.
        forwards: What that said it would cost, see :class:`ppcl.pruning.artifacts.Candidates`.
    """

    jobs: WidthJobs
    findings: Findings
    places: Sequence[Place]
    criterion: str
    forwards: float | None


def narrow_modules(stage: Fit, example: dict[str, Any], single: dict[str, Any]) -> Narrow:
    """Find the modules that can become smaller, choose their units, and fit what the analyze stage did not.

    Args:
        stage: Its blocks, states and settings.
        example: What FLOPs are counted on, of the shape that the teacher's were counted on.
        single: A call on one sample, whose time is measured.
    """
    source, settings, findings = stage.source, stage.settings, Findings(stage.folder / "units")
    sites: list[CutSite] = []
    texts: dict[Place, Parts] = {}
    scored: tuple[str, float | None] = ("", None)
    first = [(name, 0) for name in dict(source.order)]
    with torch.no_grad(), source.whole() as transformer:
        calls, _ = record_boundaries(transformer, source.adapter, example, first, first[-1])
    for group in settings.width:
        if group in source.adapter.without:
            announce(f"fit.width={group}: nothing to make smaller in this family: {source.adapter.without[group]}")
    if settings.width:
        sites = find_sites(source, calls, settings.width)
        texts = text_blocks(source, list(stage.forms)) if "text" in settings.width else {}
    if sites or texts:
        scores = None
        if sites:
            sets = draw_states(
                stage.train, settings.criterion_draws, settings.batch_size, settings.width_states, stage.seed
            )
            held_out = [batch.load().arguments for batch in stage.course.batches]
            scored = settings.criterion, criterion_cost(settings, sets, held_out)
            scores = scores_of_all(source, sites, sets, settings, stage.seed, held_out)
        course = stage.training_course("units-sweep", stage.train, settings.width_states)
        forward_sweep(course, [UnitSums(sites, texts.keys(), settings, scores, findings, stage.group)])
    flops = stage.analysis.model.flops if settings.width else 0
    meter = Meter(source, calls, batch_size(example), single, flops)
    jobs = WidthJobs(source, stage.analysis, stage.forms, settings, sites, texts, findings, meter)
    places = source.order if sites or texts else ()
    return Narrow(jobs, findings, places, *scored)


def _scored(
    stage: Fit, held_out: States, runs: Sequence[RunKey], narrow: Narrow, log: Callable[[dict[str, Any]], None] | None
) -> Candidates:
    """Price everything, fit the promising runs, and carry exactly what is to be carried."""
    analysis, settings = stage.analysis, stage.settings
    prices = priced(stage, runs, narrow)
    if settings.exact != "none":
        prices |= exactly(stage, {run_name(run): stage.linear(run) for run in runs}, "runs")
    probe_errors = {run: prices[run_name(run)].error for run in runs}
    options = [width_option(price.note, price.error) for price in prices.values() if "group" in price.note]
    always = [(stack.name, *interval) for stack in analysis.stacks for interval in stack.intervals]
    likely = shortlist(analysis.model, probe_errors, options, always, settings.max_candidates)
    starts = fitted(stage, held_out, likely, log)
    jobs = {run_name(run): Job(run, partial(_read_fitted, stage, run)) for run in starts}
    costs = exactly(stage, jobs, "fitted")
    prices |= costs  # what will stand in a run's place is the fitted block
    if settings.exact == "all":
        notes = {name: price.note for name, price in prices.items() if "group" in price.note}
        prices |= (width := exactly(stage, {name: narrow.jobs.again(note) for name, note in notes.items()}, "width"))
        options = [width_option(note, width[name].error) for name, note in notes.items()]
    fitted_errors = {name: cost.error for name, cost in costs.items()}
    # what overflows in the teacher's format is no candidate
    prices = {name: price for name, price in prices.items() if math.isfinite(price.error)}
    runs = [run for run in runs if run_name(run) in prices and math.isfinite(probe_errors[run])]
    return Candidates(
        candidates=tuple(
            Candidate(*run, probe_errors[run], starts.get(run), fitted_errors.get(run_name(run))) for run in runs
        ),
        steps=settings.steps,
        seconds=0.0,
        width=tuple(option for option in options if math.isfinite(option.error)),
        criterion=narrow.criterion,
        criterion_forwards=narrow.forwards,
        vectors={name: vector.float().numpy() for name, vector in common_vectors(prices).items()},
    )


def priced(stage: Fit, runs: Sequence[RunKey], narrow: Narrow) -> dict[str, Price]:
    """Price runs by their chained probes, and smaller modules, in one backward sweep.

    Returns:
        Prices by ``stack/first-last`` and :attr:`ppcl.pruning.artifacts.WidthOption.name`.
    """
    source, settings = stage.source, stage.settings
    findings = Findings(stage.folder / "prices")

    def jobs_at(place: Place, block: nn.Module) -> Jobs:
        ending = {run_name(run): stage.linear(run) for run in runs if (run[0], run[2]) == place}
        return {**ending, **(narrow.jobs.at(place, block) if settings.width else {})}

    with Progress("fit: prices", total=len(source.order)) as progress:
        consumer = Prices(stage.course, jobs_at, findings, progress)
        backward_sweep(stage.course, stage.store("gradients"), [consumer], settings.vectors, stage.seed)
    return read_prices(findings, source.order, velocity_norm(stage.course))


def exactly(stage: Fit, jobs: Jobs, name: str) -> dict[str, Price]:
    """Exact costs of replacements, by the random vectors of the prices and more of them."""
    vectors = max(CARRIED, stage.settings.vectors)
    return exact_costs(stage.course, jobs, stage.folder / name, f"fit: {name}", vectors, stage.seed)


def fitted(
    stage: Fit, held_out: States, runs: Sequence[RunKey], log: Callable[[dict[str, Any]], None] | None
) -> dict[RunKey, str]:
    """Fit a block to each run, each by itself; its weights go to a file, in the dtypes of the teacher's.

    Returns:
        The start that was best on held-out states, by run.
    """
    drawn = {row for step in range(stage.settings.steps) for row in stage.drawn(step)}  # no others are carried
    course = stage.training_course("train", stage.train.only(drawn))
    sample = list(held_out.weighed(held_out.spread(stage.settings.eval_states), stage.settings.batch_size))
    known = {run for run in runs if stage.file(run).is_file() and _meta(stage, run).get("of") == stage.fingerprint}

    def train(run: RunKey, ends: Ends) -> None:
        start = best_start(stage, run, sample)
        block = start_block(stage.source.copies(run[0]), run[1], run[2], start).to(torch.float32)
        _train(stage, run, block, ends, log)
        weights = in_dtypes_of(block.state_dict(), stage.source.module(run[:2]))
        write_tensors(stage.file(run), weights, {"start": start, "of": stage.fingerprint})

    trainees = Trainees(course, [run for run in runs if run not in known], train)
    if trainees.last >= 0:
        forward_sweep(course, [trainees], trainees.last)
        course.store.close()
    return {run: str(_meta(stage, run)["start"]) for run in runs}


def _meta(stage: Fit, run: RunKey) -> Any:
    return read_metadata(stage.file(run)) or {}


@torch.no_grad()
def best_start(stage: Fit, run: RunKey, sample: Sequence[tuple[Call, Share]]) -> str:
    """The start of least state loss on held-out states; of equals the first."""
    ends, losses = Ends(run, stage.course), {}
    for start in stage.settings.starts:
        block = start_block(stage.source.copies(run[0]), run[1], run[2], start)
        with autocast(stage.source.device, stage.course.precision):
            losses[start] = sum(float(ends.loss(block, call, share, split="held-out")) for call, share in sample)
    return min(losses, key=lambda start: losses[start])


def _train(stage: Fit, run: RunKey, block: nn.Module, ends: Ends, log: Callable[[dict[str, Any]], None] | None) -> None:
    settings, name = stage.settings, run_name(run)
    if settings.steps == 0:
        return

    loop_settings = LoopSettings(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup_steps=5,
        ema_decay=0.0,
        checkpoint_every=max(10, settings.steps // 4),
        seed=stage.seed,
        batch_size=settings.batch_size,
    )
    folder = stage.folder / f"fit-{name.replace('/', '-')}"
    report = None if log is None else lambda row: log({**row, "run": name})
    identity = digest(name, settings.model_dump(), stage.seed, stage.fingerprint)
    loop = TrainingLoop({name: block}, loop_settings, folder, identity, report, f"fit: {name}")
    for step in loop:
        for call, share in stage.train.share_out(stage.drawn(step)):
            with autocast(stage.source.device, stage.course.precision):
                loss = ends.loss(block, call, share)
            loss.backward()  # type: ignore[no-untyped-call]
            loop.add({"loss": loss.item()})
        loop.step()
    remove(folder)


def _read_fitted(stage: Fit, run: RunKey, _: nn.Module) -> nn.Module:
    tensors, meta = read_tensors(stage.file(run))
    block = stage.source.copy((run[0], start_index(run[1], run[2], meta["start"]))).to(torch.float32)
    block.load_state_dict(tensors)
    return block


def _write(stage: Fit, out: Path, result: Candidates, narrow: Narrow) -> None:
    """Write everything, a tensor at a time."""
    blocks: dict[str, Unread] = {}
    for fitted_run in (run for run in result.candidates if run.fitted_error is not None):
        stored = StoredTensors(stage.file((fitted_run.stack, fitted_run.first, fitted_run.last)))
        blocks |= {f"{fitted_run.name}/{name}": stored.unread(name) for name in stored}
    write_one_by_one(out / "candidates.safetensors", blocks)
    forms: dict[str, Unread] = {}
    for place in narrow.places:
        stored = StoredTensors(narrow.findings.path(KIND, place))
        forms |= {f"{place[0]}/{place[1]}/{name}": stored.unread(name) for name in stored}
    write_one_by_one(out / "width.safetensors", forms)
    write_tensors(out / VECTORS, {name: torch.from_numpy(vector) for name, vector in result.vectors.items()})
    save_artifact(result, out / "candidates.json")
