"""Width options: smaller modules inside one block, and what each costs alone, untrained.

Modulation layers become low-rank where few directions of their inputs occur (the conditioning
of a diffusion transformer lies on a curve); feed-forward networks become affine maps (eq. 9) or
lose neurons; attentions lose heads; text streams become two linear maps (eq. 8). All start from
closed forms, so their costs are known without training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark import timer as wall_clock
from torch.utils.flop_counter import FlopCounterMode

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.analysis.prices import Job, output_errors
from ppcl.capture.states import States
from ppcl.config import FitConfig
from ppcl.modules.replacements import apply_width
from ppcl.pruning.artifacts import WidthOption
from ppcl.pruning.criteria.draws import draw_states
from ppcl.pruning.fewer_units import criterion_cost, cut_options, find_sites, text_options
from ppcl.student.assembly import fill_width, with_blocks
from ppcl.teacher.call_arguments import batch_size, to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.flops import count_params
from ppcl.teacher.trace import BlockCall, record_boundaries

Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Proposal:
    """Replacements inside one block that are worth measuring."""

    spec: StackSpec
    index: int
    group: str
    parts: Parts


@dataclass(frozen=True)
class WidthResult:
    """What the fit stage found about width.

    Attributes:
        options: All options, with what each saves and costs.
        tensors: Closed forms that the analyze stage did not know (see :func:`ppcl.student.assembly.fill_width`).
        criterion: What scored units; empty where there are none.
        criterion_forwards: See :class:`ppcl.pruning.artifacts.Candidates`.
    """

    options: tuple[WidthOption, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    criterion: str = ""
    criterion_forwards: float | None = None


def width_options(
    transformer: nn.Module,
    adapter: Adapter,
    analysis: Analysis,
    tensors: Mapping[str, Tensor],
    batches: Sequence[dict[str, Any]],
    settings: FitConfig,
    train: States | None = None,
    seed: int = 0,
    precision: str = "auto",
) -> WidthResult:
    """Find and score all width options.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        analysis: Which ranks reach which tolerance.
        tensors: Closed forms, as the analyze stage wrote them.
        batches: Held-out states.
        settings: ``width`` names the groups.
        train: Training states, behind fewer neurons and heads and the text stream; without them there are none.
        seed: For the criterion.
        precision: Autocast of the passes that measure errors.
    """
    if not settings.width:
        return WidthResult()
    first = {(spec.name, 0) for spec in adapter.stacks}
    calls, _ = record_boundaries(transformer, adapter, batches[0], first)
    proposals = list(_closed_forms(transformer, adapter, analysis, settings))
    made: dict[str, Tensor] = {}
    scored: tuple[str, float | None] = ("", None)
    if train is not None:
        sets = draw_states(train, settings.criterion_draws, settings.batch_size, settings.width_states, seed)
        states = sets[0]
        sites = find_sites(transformer, adapter, calls, settings.width)
        parts: list[list[dict[str, Any]]] = []
        if sites:
            scored = settings.criterion, criterion_cost(settings, sets, batches)
            parts, made = cut_options(transformer, adapter, sites, states, settings, seed, sets[1:], batches)
        specs = {spec.name: spec for spec in adapter.stacks}
        for (group, site, _), sizes in zip(sites, parts, strict=True):
            proposals += [Proposal(specs[site.stack], site.block, group, {site.path: part}) for part in sizes]
        if "text" in settings.width:
            streams, maps = text_options(transformer, adapter, tensors, states)
            made |= maps
            proposals += [Proposal(specs[name], index, "text", p) for (name, index), p in streams.items()]
    device = next(transformer.parameters()).device
    single = to_device(next(train.batches(1)), device) if train is not None else None
    meter = _Meter(transformer, adapter, calls, batch_size(batches[0]), single, analysis.model.flops)
    options = _measured(transformer, adapter, proposals, {**tensors, **made}, batches, meter, precision)
    return WidthResult(options, made, *scored)


def _measured(
    transformer: nn.Module,
    adapter: Adapter,
    proposals: Sequence[Proposal],
    tensors: Mapping[str, Tensor],
    batches: Sequence[dict[str, Any]],
    meter: _Meter,
    precision: str,
) -> tuple[WidthOption, ...]:
    """Give every proposal its savings and its error; those that save nothing are left out."""
    jobs: dict[int, Job] = {}
    savings: dict[int, Saving] = {}
    for number, proposal in enumerate(proposals):

        def make(at: Proposal = proposal) -> nn.Module:
            block = adapter.blocks(transformer, at.spec)[at.index]
            smaller = copy.deepcopy(block)
            apply_width(smaller, at.parts)
            fill_width(smaller, block, at.spec, at.index, at.parts, tensors)
            return smaller

        if (proposal.spec.name, 0) not in meter.calls:
            continue
        block = adapter.blocks(transformer, proposal.spec)[proposal.index]
        savings[number] = meter.measure(proposal, block, make)
        if savings[number].params > 0:
            jobs[number] = ((proposal.spec.name, proposal.index, proposal.index), make)
    if not jobs:
        return ()
    errors = output_errors(transformer, adapter, batches, jobs, "fit: width", precision)
    return tuple(
        WidthOption(p.spec.name, p.index, p.group, p.parts, saved.params, saved.flops, errors[number], saved.time)
        for number, p, saved in ((n, proposals[n], savings[n]) for n in jobs)
    )


def _closed_forms(
    transformer: nn.Module, adapter: Adapter, analysis: Analysis, settings: FitConfig
) -> Iterator[Proposal]:
    """What the analyze stage has the closed forms of: low-rank modulation, linear feed-forward networks."""
    for spec in adapter.stacks:
        for found in (stack for stack in analysis.stacks if stack.name == spec.name):
            for index in range(len(adapter.blocks(transformer, spec))):
                if "modulation" in settings.width and found.modulation_residual:
                    # beside a text option the streams are chosen apart: it replaces the text's modulation, too
                    apart = "text" in settings.width and bool(spec.text_parts)
                    streams = [[s] for s in found.modulation_residual] if apart else [list(found.modulation_residual)]
                    for chosen in streams:
                        group = f"modulation.{chosen[0]}" if apart else "modulation"
                        for parts in _ranks(spec, found, index, chosen, settings):
                            yield Proposal(spec, index, group, parts)
                for stream, path in spec.ffn.items() if "ffn" in settings.width else ():
                    measured = found.ffn_linearity.get(stream, ())
                    if index < len(measured) and measured[index] is not None:
                        yield Proposal(spec, index, f"ffn.{stream}", {path: {"kind": "linear", "size": 0}})


def _ranks(
    spec: StackSpec, found: StackAnalysis, index: int, streams: Sequence[str], settings: FitConfig
) -> Iterator[Parts]:
    """Low-rank modulation of some streams, once for each set of ranks that the tolerances lead to."""
    seen = set()
    for tolerance in settings.modulation_tolerances:
        ranks = {
            spec.modulation[stream]: [
                rank for rank, missed in enumerate(found.modulation_residual[stream][index]) if missed <= tolerance
            ]
            for stream in streams
        }
        key = tuple(sorted((path, enough[0]) for path, enough in ranks.items() if enough))
        if key and key not in seen:
            seen.add(key)
            yield {path: {"kind": "low_rank", "size": max(1, rank)} for path, rank in key}


@dataclass(frozen=True)
class Saving:
    """What smaller modules save: parameters, FLOPs of one sample, and time in FLOPs (None: not measured)."""

    params: int
    flops: int
    time: int | None


class _Meter:
    """Measures what proposals save; blocks of one shape save alike, so each kind is measured once.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        calls: The first blocks' calls on a batch, by stack.
        samples: In that batch.
        single: A call on one sample, for the time; None leaves the time out.
        flops: Of the whole transformer for one sample.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        calls: Mapping[tuple[str, int], BlockCall],
        samples: int,
        single: dict[str, Any] | None,
        flops: int,
    ) -> None:
        self.transformer, self.adapter, self.calls, self.samples = transformer, adapter, calls, samples
        self.single, self.flops = single, flops
        self.known: dict[Any, tuple[int, int]] = {}
        self.whole: dict[Any, int] = {}
        self.times: dict[Any, int] = {}

    def measure(self, proposal: Proposal, block: nn.Module, make: Callable[[], nn.Module]) -> Saving:
        """Measure one proposal for a block; ``make`` builds the smaller one."""
        call = self.calls[proposal.spec.name, 0]
        shape = (proposal.spec.name, _shapes(block))
        parts = [(path, part["kind"], part["size"]) for path, part in proposal.parts.items()]
        alike = (shape, *parts)
        if shape not in self.whole:
            self.whole[shape] = _flops(self.adapter, block, call) // self.samples
        if alike not in self.known:
            smaller = make()
            flops = self.whole[shape] - _flops(self.adapter, smaller, call) // self.samples
            self.known[alike] = count_params(block) - count_params(smaller), flops
        if self.single is None or not self.flops:
            return Saving(*self.known[alike], None)
        # ranks differ from block to block, and make no difference to the time
        like = (shape, *((path, kind, 0 if kind == "low_rank" else size) for path, kind, size in parts))
        if like not in self.times:
            self.times[like] = self._time(proposal, shape[1])
        return Saving(*self.known[alike], self.times[like])

    def _time(self, proposal: Proposal, shapes: Any) -> int:
        """Time in FLOPs that one block saves: all blocks of its shape made smaller, on a whole call."""
        blocks, count = [], 0
        for block in self.adapter.blocks(self.transformer, proposal.spec):
            if _shapes(block) == shapes:
                block = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
                apply_width(block, proposal.parts)
                count += 1
            blocks.append(block)
        student = with_blocks(self.transformer, {proposal.spec.name: blocks})
        share = saved_time(self.transformer, student, self.single or {})
        return round(share * self.flops / count)


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    return tuple(p.shape for p in block.parameters())


@torch.no_grad()
def _flops(adapter: Adapter, block: nn.Module, call: BlockCall) -> int:
    with FlopCounterMode(display=False) as counter:
        adapter.call(call.stack, block, call.inputs, call.arguments)
    return int(counter.get_total_flops())


@torch.no_grad()
def saved_time(transformer: nn.Module, student: nn.Module, arguments: dict[str, Any], rounds: int = 7) -> float:
    """The share of a transformer's time that a student saves.

    Whole calls in turn, and the least of some rounds, since whatever else runs only adds. A module by itself, with its
    weights in the cache, says little about its part of a call that streams all weights. On one CPU thread it is the
    process's own time: another program on the same core would otherwise make one of the two look many times slower.

    Args:
        transformer: The teacher's transformer.
        student: The same with something smaller in all of its blocks.
        arguments: A call on one sample.
        rounds: Rounds in which both are timed in turn, two calls each.

    Returns:
        A share, 0 or more and below 1.
    """
    threads, device = torch.get_num_threads(), next(transformer.parameters()).device
    clock = time.process_time if threads == 1 and device.type == "cpu" else wall_clock
    timers = [
        Timer("call(model, arguments)", globals=values, num_threads=threads, timer=clock)
        for values in ({"call": velocity, "model": model, "arguments": arguments} for model in (transformer, student))
    ]
    times = [[timer.timeit(2).mean for timer in timers] for _ in range(rounds)]
    before, after = (min(column) for column in zip(*times, strict=True))
    return float(min(0.99, max(0.0, 1 - after / before)))
