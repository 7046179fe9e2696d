"""The fit stage: what would it cost to let one block replace this run?

Every run of 2..max_run blocks is scored by how far the teacher's final velocity moves when
the run alone is replaced by its chained probes (output sensitivity). The most promising
ones are then fitted for a few steps, all at once, since non-sequential training lets one
teacher pass serve them all, and scored again with the fitted block. Smaller modules inside
single blocks (:mod:`ppcl.pruning.options`) are scored the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.prices import Job, output_errors
from ppcl.analysis.probes import chained_probe
from ppcl.capture.states import States
from ppcl.common.artifacts import save_artifact
from ppcl.common.devices import autocast
from ppcl.common.files import digest, write_tensors
from ppcl.common.streams import step_generator
from ppcl.config import FitConfig
from ppcl.distill.local import local_backward
from ppcl.pruning.artifacts import Candidate, Candidates
from ppcl.pruning.options import WidthResult, width_options
from ppcl.student.assembly import LinearRun, RunKey, run_name, start_block
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.training.distributed import SINGLE, Group, Share, add_up
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings


def all_runs(analysis: Analysis, max_run: int) -> list[RunKey]:
    """Every run of 2..max_run blocks of every stack, and the paper's intervals whatever their length."""
    runs: set[RunKey] = set()
    for stack in analysis.model.stacks:
        for first in range(stack.num_blocks):
            runs |= {(stack.name, first, last) for last in range(first + 1, min(first + max_run, stack.num_blocks))}
    for found in analysis.stacks:
        runs |= {(found.name, *interval) for interval in found.intervals}
    order = [stack.name for stack in analysis.model.stacks]
    return sorted(runs, key=lambda run: (order.index(run[0]), run[1], run[2]))


def shortlist(errors: Mapping[RunKey, float], always: Sequence[RunKey], count: int) -> list[RunKey]:
    """Choose the runs to fit: those in ``always``, pairs for up to half of the places, then all lengths in turn.

    The planner can only lay out what was fitted, so of each length the cheapest runs that do not overlap come first,
    then the cheapest of the rest, and so on: every place of a stack is covered before any is covered twice. Pairs
    come first because they are cheapest for each block that they save.
    """
    by_length: dict[int, list[RunKey]] = {}
    for run in errors:
        by_length.setdefault(run[2] - run[1], []).append(run)
    orders = {length: spread_out(runs, errors) for length, runs in sorted(by_length.items())}
    chosen = list(dict.fromkeys(always))
    pairs = orders.get(1, [])
    for run in pairs[: max(0, count // 2)]:
        if run not in chosen and len(chosen) < count:
            chosen.append(run)
    position = 0
    while len(chosen) < count and any(position < len(order) for order in orders.values()):
        for order in orders.values():
            if position < len(order) and order[position] not in chosen and len(chosen) < count:
                chosen.append(order[position])
        position += 1
    return sorted(chosen)


def spread_out(runs: Sequence[RunKey], errors: Mapping[RunKey, float]) -> list[RunKey]:
    """Order runs of one length: the cheapest that do not overlap, then the cheapest of the rest, and so on."""
    left, order = sorted(runs, key=lambda run: (errors[run], run)), []
    while left:
        layer: list[RunKey] = []
        for run in left:
            if all(run[0] != other[0] or run[2] < other[1] or other[2] < run[1] for other in layer):
                layer.append(run)
        order += layer
        left = [run for run in left if run not in layer]
    return order


@torch.no_grad()
def best_starts(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], runs: Sequence[RunKey], starts: Sequence[str]
) -> dict[RunKey, str]:
    """The start of least state error on held-out states, for each run."""
    best: dict[RunKey, tuple[float, str]] = {}
    for start in starts:
        blocks = {run: start_block(_blocks(transformer, adapter, run), run[1], run[2], start) for run in runs}
        for run, loss in local_backward(transformer, adapter, arguments, blocks, backward=False).items():
            if run not in best or loss < best[run][0]:
                best[run] = (loss, start)
    return {run: start for run, (_, start) in best.items()}


def _jobs(runs: Sequence[RunKey], replacement: Callable[[RunKey], nn.Module]) -> dict[RunKey, Job]:
    return {run: (run, partial(replacement, run)) for run in runs}


def _blocks(transformer: nn.Module, adapter: Adapter, run: RunKey) -> nn.ModuleList:
    return adapter.blocks(transformer, _spec(adapter, run[0]))


def _spec(adapter: Adapter, name: str) -> StackSpec:
    return next(spec for spec in adapter.stacks if spec.name == name)


def fit(
    transformer: nn.Module,
    adapter: Adapter,
    analysis: Analysis,
    probes: Mapping[str, Tensor],
    calibration: Path,
    out: Path,
    settings: FitConfig,
    seed: int,
    log: Callable[[dict[str, Any]], None] | None = None,
    group: Group = SINGLE,
    precision: str = "auto",
) -> Candidates:
    """Score candidate runs; write ``candidates.safetensors``, ``width.safetensors`` and then ``candidates.json``.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        analysis: The paper's intervals are always among the fitted runs.
        probes: Probe matrices by ``stack/block/stream/weight|bias``.
        calibration: The captured states.
        out: The run directory; checkpoints go to ``out/checkpoints/fit``.
        settings: See :class:`FitConfig`.
        seed: Fixes the batches.
        log: Receives one dict a training step.
        group: The processes that share the work; the first one writes.
        precision: Autocast of the passes: substitutes are float32, the teacher may not be.
    """
    began = time.perf_counter()
    device = next(transformer.parameters()).device
    held_out, train = States(calibration, "held-out"), States(calibration, "train")
    batches = list(held_out.batches(settings.eval_states, settings.eval_states))
    runs = all_runs(analysis, settings.max_run)

    def linear(run: RunKey) -> nn.Module:
        spec = _spec(adapter, run[0])
        maps = chained_probe(probes, run, list(spec.inputs), device)
        return LinearRun(adapter, spec, _blocks(transformer, adapter, run)[run[1]], maps)

    def errors(replacements: Mapping[RunKey, Job], label: str) -> dict[RunKey, float]:
        return group.spread(
            replacements, lambda own: output_errors(transformer, adapter, batches, own, label, precision)
        )

    probe_errors = errors(_jobs(runs, linear), "fit: sensitivity")
    always = [(found.name, *interval) for found in analysis.stacks for interval in found.intervals]
    chosen = shortlist(probe_errors, always, settings.max_candidates)
    starts = group.on_main(lambda: best_starts(transformer, adapter, batches[0], chosen, settings.starts))
    substitutes = {
        run: start_block(_blocks(transformer, adapter, run), run[1], run[2], starts[run]).to(torch.float32)
        for run in chosen
    }
    _train(transformer, adapter, train, substitutes, out, settings, seed, log, group, precision)
    fitted = errors(_jobs(chosen, substitutes.__getitem__), "fit: costs")

    def measure_width() -> WidthResult:
        width = width_options(transformer, adapter, analysis, probes, batches, settings, train, seed, precision)
        write_tensors(out / "width.safetensors", width.tensors)
        return replace(width, tensors={})

    measured = group.on_main(measure_width)
    result = Candidates(
        candidates=tuple(
            Candidate(run[0], run[1], run[2], probe_errors[run], starts.get(run), fitted.get(run)) for run in runs
        ),
        steps=settings.steps,
        seconds=time.perf_counter() - began,
        width=measured.options,
        criterion=measured.criterion,
        criterion_forwards=measured.criterion_forwards,
    )
    tensors = {f"{run_name(r)}/{k}": v for r, block in substitutes.items() for k, v in block.state_dict().items()}
    if group.is_main:
        write_tensors(out / "candidates.safetensors", tensors)
        save_artifact(result, out / "candidates.json")
    return result


def _train(
    transformer: nn.Module,
    adapter: Adapter,
    train: States,
    substitutes: dict[RunKey, nn.Module],
    out: Path,
    settings: FitConfig,
    seed: int,
    log: Callable[[dict[str, Any]], None] | None,
    group: Group,
    precision: str,
) -> None:
    """Fit all candidates together; each has its own loss and its own gradient norm."""
    if settings.steps == 0:
        return
    device = next(transformer.parameters()).device

    def backward(step: int) -> dict[str, float]:
        parts = train.parts(settings.batch_size, step_generator(seed, step, 23), group)
        return add_up(one(call.arguments, share) for call, share in parts)

    def one(arguments: dict[str, Any], share: Share) -> dict[str, float]:
        with autocast(device, precision):
            losses = local_backward(transformer, adapter, arguments, substitutes, share=share)
        return {"loss": sum(losses.values()) / len(losses)}

    loop_settings = LoopSettings(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup_steps=min(5, settings.steps),
        clip_each=True,  # one candidate's large gradient must not shrink the others' steps
        ema_decay=0.0,
        checkpoint_every=max(10, settings.steps // 4),
        seed=seed,
        batch_size=settings.batch_size,
    )
    modules = {run_name(run).replace(".", "_"): block for run, block in substitutes.items()}
    fingerprint = digest(sorted(modules), settings.model_dump(), seed)
    folder = out / "checkpoints" / "fit"
    TrainingLoop(modules, backward, loop_settings, folder, fingerprint, log, "fit", group).run()
