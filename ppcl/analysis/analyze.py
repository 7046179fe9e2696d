"""The analyze stage: one forward sweep of the states through the teacher; a block is solved when it leaves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.analysis.cka import combine, drawn_ckas
from ppcl.analysis.findings import Findings
from ppcl.analysis.intervals import detect_intervals, stability
from ppcl.analysis.kept_tokens import KeptTokens, kept_levels
from ppcl.analysis.modulation import Modulations
from ppcl.analysis.moments import Moments, best_ridge
from ppcl.analysis.sums import BlockSums, Totals
from ppcl.analysis.sweep import Course, Seen, batches_of, forward_sweep
from ppcl.capture.states import States
from ppcl.capture.store import StateStore
from ppcl.common.artifacts import save_artifact
from ppcl.common.files import remove
from ppcl.common.lazy import Lazy
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import Unread, write_one_by_one
from ppcl.config import AnalyzeConfig, PlanConfig
from ppcl.student.plan import free_blocks
from ppcl.teacher.blocks import Blocks, Place, main_dtype
from ppcl.teacher.families import StackSpec
from ppcl.teacher.model_info import ModelInfo
from ppcl.training.distributed import SINGLE, Group

SWEEP = "sweep"  # folder of a run: states between blocks, and what was found out of blocks


class Counted:
    """A consumer that counts states at blocks."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Every block counts."""
        return ()

    def see(self, seen: Seen) -> None:
        """Count a batch."""
        self.progress.advance(len(seen.batch.rows))

    def finish(self) -> None:
        """Nothing is left to do."""


def solve_block(
    place: Place, totals: Totals, ridges: tuple[float, ...], findings: Findings, group: Group = SINGLE
) -> None:
    """Solve all that is linear in a block, each process other signals, and write maps and errors."""
    sums = {
        signal: (moments, totals.moments["held-out", signal])
        for (split, signal), moments in totals.moments.items()
        if split == "train"
    }

    def solve(own: dict[str, tuple[Moments, Moments]]) -> dict[str, tuple[Tensor, Tensor, float, float]]:
        found = {}
        for signal, pair in own.items():
            weight, bias, strength, error = best_ridge(*pair, ridges)
            if signal.startswith("ffn."):
                weight, bias = weight.float(), bias.float()
            found[signal] = weight.cpu(), bias.cpu(), strength, error
        return found

    solved = group.spread(sums, solve)
    tensors: dict[str, Tensor] = {}
    for signal, (weight, bias, _, _) in solved.items():
        if signal != "input.text":  # what a text input follows from is not needed, only how well
            tensors |= {f"{signal}/weight": weight, f"{signal}/bias": bias}
    numbers = {
        "errors": {signal: error for signal, (_, _, _, error) in solved.items()},
        "ridges": {signal: strength for signal, (_, _, strength, _) in solved.items()},
        "cosines": totals.cosines,
        "tokens": totals.tokens,
    }
    group.on_main(lambda: findings.write("forms", place, tensors, numbers))


def analyze(
    source: Blocks,
    model: ModelInfo,
    calibration: Path,
    out: Path,
    settings: AnalyzeConfig,
    seed: int,
    protected: PlanConfig | None = None,
    fingerprint: str | None = None,
    group: Group = SINGLE,
) -> Analysis:
    """Analyze the teacher; write ``analysis.safetensors`` and then ``analysis.json`` into ``out``.

    Args:
        source: The teacher's blocks.
        model: Its description.
        calibration: The captured states.
        out: The run directory.
        settings: See :class:`AnalyzeConfig`.
        seed: Fixes the tokens kept for CKA, and the draws of them.
        protected: Names the protected blocks, which no interval takes; those of the default settings if None.
        fingerprint: Of all that the result depends on: a sweep that was killed goes on at its block where it had the
            same. None begins anew.
        group: The processes that share the states, the solving and the chains; the first one writes.
    """
    began = time.perf_counter()
    splits = {name: States(calibration, name) for name in ("train", "held-out")}
    counts, folder = {name: len(states) for name, states in splits.items()}, out / SWEEP
    if fingerprint is None:
        group.on_main(lambda: remove(folder))
    findings, store = Findings(folder), StateStore(folder, fingerprint or "", group=group)
    course = Course(source, batches_of(splits, settings.batch_size), store, group)
    solve = partial(solve_block, ridges=settings.ridges, findings=findings, group=group)
    sums = BlockSums(counts, settings.rows_per_feature, solve, group)
    tokens = KeptTokens(splits["held-out"], settings.cka_tokens, seed, findings, group)
    modulations = Modulations(source, course.batches[0], splits, settings.batch_size, seed, findings, group)
    with Progress("analyze", total=len(source.order) * sum(len(batch.rows) for batch in course.own)) as progress:
        forward_sweep(course, [sums, tokens, modulations, Counted(progress)])
    found = []
    for info in model.stacks:
        if info.num_blocks:
            free = free_blocks(model, info, protected or PlanConfig())  # type: ignore[call-arg]
            found.append(_analyze_stack(source, source.stacks[info.name], findings, seed, free, group))
    # the same tokens pass through all stacks: those of the first one count
    first = [findings.numbers("forms", (stack.name, 0))["tokens"] for stack in found]
    analysis = Analysis(
        model=model,
        stacks=tuple(found),
        num_states=sum(counts.values()),
        num_tokens={stream: int(n) for tokens in reversed(first) for stream, n in reversed(tokens.items()) if n},
        seconds=time.perf_counter() - began,
    )
    group.on_main(lambda: write_one_by_one(out / "analysis.safetensors", _matrices(source, findings, modulations)))
    group.on_main(lambda: save_artifact(analysis, out / "analysis.json"))
    store.close()
    return analysis


def _matrices(source: Blocks, findings: Findings, modulations: Modulations) -> dict[str, Unread]:
    """Probes and linear maps of networks in the teacher's dtype, and what modulation layers are given.

    Many layers are given the same, which is ``inputs/NUMBER/mean`` and ``inputs/NUMBER/root``; each names its number.
    """
    matrices: dict[str, Unread] = {}
    numbers = {layer: number for number, layer in enumerate(modulations.conditions)}
    for layer, number in numbers.items():
        fitted = modulations.conditions[layer].fitted
        for name, tensor in (("mean", fitted.mean), ("root", fitted.root)):
            matrices[f"inputs/{number}/{name}"] = Unread(tensor.shape, torch.float32, partial(torch.clone, tensor))
    for place in source.order:
        here, dtype = f"{place[0]}/{place[1]}", main_dtype(source.module(place))
        for name, shape in findings.shapes("forms", place).items():
            matrices[f"{here}/{name}"] = Unread(shape, dtype, partial(_read, findings, place, name))
        if source.spec(place).modulation:
            for stream, layer in findings.numbers("modulation", place)["source"].items():
                which = torch.tensor(numbers[tuple(layer)])
                matrices[f"{here}/modulation.{stream}/inputs"] = Unread((), which.dtype, partial(torch.clone, which))
    return matrices


def _read(findings: Findings, place: Place, name: str) -> Tensor:
    return findings.tensors("forms", place, name)[0]


def _analyze_stack(
    source: Blocks, spec: StackSpec, findings: Findings, seed: int, free: tuple[int, int], group: Group
) -> StackAnalysis:
    """Put the findings of one stack together, and add CKA and intervals."""
    places = [place for place in source.order if place[0] == spec.name]
    forms = [findings.numbers("forms", place) for place in places]
    streams = [stream for stream in spec.inputs if stream in forms[-1]["errors"]]
    tokens = {stream: kept_levels(findings, spec.name, stream, len(places)) for stream in streams}

    def probe(stream: str, index: int) -> tuple[Tensor, Tensor]:
        weight, bias = findings.tensors("forms", places[index], f"{stream}/weight", f"{stream}/bias")
        return weight.to(source.device), bias.to(source.device)

    chains = {stream: Lazy(len(places), lambda index, s=stream: probe(s, index)) for stream in streams}  # type: ignore[misc]
    tables, drawn = drawn_ckas(tokens, chains, step_generator(seed, 0, Stream.CKA_HALVES), group)
    shares = {stream: float(forms[0]["tokens"][stream]) for stream in streams}
    cka = combine(tables, shares)
    low, high = free
    intervals = detect_intervals(cka, low, high - 1)
    again = [detect_intervals(combine(one, shares), low, high - 1) for one in drawn]

    def errors(signal: str) -> tuple[float | None, ...]:
        return tuple(form["errors"].get(signal) for form in forms)

    return StackAnalysis(
        name=spec.name,
        cka=tuple(map(tuple, cka)),
        cka_by_stream={stream: tuple(map(tuple, table)) for stream, table in tables.items()},
        intervals=tuple(intervals),
        interval_draws=len(again),
        interval_stability=stability(intervals, again) if again else (),
        probe_error={stream: tuple(form["errors"][stream] for form in forms) for stream in streams},
        ridge={stream: tuple(form["ridges"][stream] for form in forms) for stream in streams},
        influence=tuple(1 - form["cosines"]["sum"] / form["cosines"]["count"] for form in forms),
        ffn_linearity={stream: errors(f"ffn.{stream}") for stream in spec.ffn},
        text_linearity={"input": errors("input.text"), "output": errors("text")} if spec.text_qkv else {},
        modulation_residual=_modulation_residual(source, spec, places, findings),
    )


def _modulation_residual(
    source: Blocks, spec: StackSpec, places: Sequence[Place], findings: Findings
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """For each stream and block, what each rank of the modulation layer misses where it was not fitted, if it may."""
    missed: list[Mapping[str, Sequence[float]]] = [
        findings.numbers("modulation", place)["missed"] if source.spec(place).modulation else {} for place in places
    ]
    return {
        stream: tuple(tuple(block.get(stream, ())) for block in missed)
        for stream in spec.modulation
        if any(stream in block for block in missed)
    }
