"""Width options: smaller modules inside one block, and what each saves and costs alone, untrained.

Modulation layers become low-rank where few directions of their inputs occur (the conditioning
of a diffusion transformer lies on a curve); feed-forward networks become affine maps (eq. 9) or
lose neurons; attentions lose heads; text streams become two linear maps (eq. 8). All start from
closed forms, so their costs are known without training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer as wall_clock

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.analysis.findings import Findings
from ppcl.analysis.prices import Job
from ppcl.config import FitConfig
from ppcl.modules.parts import FAMILIES, cuts_of, label
from ppcl.modules.replacements import apply_width
from ppcl.pruning.artifacts import WidthOption, option_name
from ppcl.pruning.fewer_units import KIND, Parts
from ppcl.pruning.unit_search import CutSite
from ppcl.student.assembly import fill_width, with_blocks
from ppcl.teacher.blocks import Blocks, Place, ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import StackSpec
from ppcl.teacher.flops import count_flops, count_params
from ppcl.teacher.trace import BlockCall

ROUNDS = 9  # in which what is large and what is smaller are timed in turn


@dataclass(frozen=True)
class Proposal:
    """Replacements inside one block that are worth measuring."""

    group: str
    parts: Parts


class WidthJobs:
    """The smaller modules of each block that save something, as jobs to be priced.

    Args:
        source: The teacher's blocks.
        analysis: Which ranks reach which tolerance.
        tensors: Closed forms, as the analyze stage wrote them; those of this sweep are read from ``findings``.
        settings: ``width`` names the groups.
        sites: What can lose units.
        texts: Blocks whose text stream can become linear.
        findings: Of :class:`ppcl.pruning.fewer_units.UnitSums`.
        meter: Measures what is saved.
    """

    def __init__(
        self,
        source: Blocks,
        analysis: Analysis,
        tensors: Mapping[str, Tensor],
        settings: FitConfig,
        sites: Sequence[CutSite],
        texts: Mapping[Place, Parts],
        findings: Findings,
        meter: Meter,
    ) -> None:
        self.source, self.analysis, self.tensors, self.settings = source, analysis, tensors, settings
        self.sites, self.texts, self.findings, self.meter = sites, texts, findings, meter

    def at(self, place: Place, block: nn.Module) -> dict[str, Job]:
        """The jobs of a block that is lent."""
        if (place[0], 0) not in self.meter.calls:
            return {}
        spec, tensors = self.source.stacks[place[0]], self._forms(place)
        jobs: dict[str, Job] = {}
        for proposal in self._proposals(place, block):
            smaller = shrunk(block, proposal.parts)
            fill_width(smaller, block, spec, place[1], proposal.parts, tensors)
            saving = self.meter.measure(place[0], proposal.parts, block, smaller)
            if saving.params > 0:
                note = {
                    "group": proposal.group,
                    "parts": proposal.parts,
                    "saved": [saving.params, saving.flops, saving.time],
                }
                name = option_name(*place, proposal.group, proposal.parts)
                jobs[name] = Job((*place, place[1]), partial(_given, smaller), note)
        return jobs

    def again(self, note: Mapping[str, Any]) -> Job:
        """A job that was noted before; it makes its module when its block's turn comes."""
        stack, index, _ = note["run"]

        def make(block: nn.Module) -> nn.Module:
            smaller, spec = shrunk(block, note["parts"]), self.source.stacks[stack]
            fill_width(smaller, block, spec, index, note["parts"], self._forms((stack, index)))
            return smaller

        return Job((stack, index, index), make, note)

    def _forms(self, place: Place) -> dict[str, Tensor]:
        """The closed forms of a block, and what many blocks' layers are given."""
        prefix = f"{place[0]}/{place[1]}/"
        tensors = {name: self.tensors[name] for name in self.tensors if name.startswith((prefix, "inputs/"))}
        if self.sites or self.texts:
            names = list(self.findings.shapes(KIND, place))
            read = self.findings.tensors(KIND, place, *names)
            tensors |= {prefix + name: tensor for name, tensor in zip(names, read, strict=True)}
        return tensors

    def _proposals(self, place: Place, block: nn.Module) -> Iterator[Proposal]:
        spec = self.source.stacks[place[0]]
        for stack in self.analysis.stacks:
            if stack.name == spec.name:
                yield from _closed_forms(spec, stack, place[1], self.settings)
        here = [site for site in self.sites if site.place == place]
        if here:
            sizes: Mapping[str, list[dict[str, Any]]] = self.findings.numbers(KIND, place)
            for site in here:
                yield from (Proposal(_group(site, part), {site.path: part}) for part in sizes[site.path])
        if place in self.texts:
            yield Proposal("text", self.texts[place])


def _group(site: CutSite, part: Mapping[str, Any]) -> str:
    """The group of an option; where heads and neurons go together, of what it cuts."""
    if site.group != "parallel":
        return site.group
    return "+".join(FAMILIES[cut["kind"]] for cut in reversed(cuts_of(part)) if cut["size"] < cut["of"])


def _given(module: nn.Module, _: nn.Module) -> nn.Module:
    return module


def shrunk(block: nn.Module, parts: Parts) -> nn.Module:
    """A copy of a block with smaller modules, yet without their weights; all else is shared with it."""
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    smaller = copy.deepcopy(block, shared)
    apply_width(smaller, parts)
    return smaller


def width_option(note: Mapping[str, Any], error: float) -> WidthOption:
    """An option, from what was noted of its job and what it costs."""
    params, flops, seconds = note["saved"]
    stack, block, _ = note["run"]
    return WidthOption(stack, block, note["group"], note["parts"], params, flops, error, seconds)


def _closed_forms(spec: StackSpec, stack: StackAnalysis, index: int, settings: FitConfig) -> Iterator[Proposal]:
    """What the analyze stage has the closed forms of: low-rank modulation, linear feed-forward networks."""
    if "modulation" in settings.width and stack.modulation_residual:
        # beside a text option the streams are chosen apart: it replaces the text's modulation, too
        apart = "text" in settings.width and bool(spec.text_parts)
        streams = [[s] for s in stack.modulation_residual] if apart else [list(stack.modulation_residual)]
        for together in streams:
            group = f"modulation.{together[0]}" if apart else "modulation"
            yield from (Proposal(group, parts) for parts in _ranks(spec, stack, index, together, settings))
    for stream, path in spec.ffn.items() if "ffn" in settings.width else ():
        measured = stack.ffn_linearity.get(stream, ())
        if index < len(measured) and measured[index] is not None:
            yield Proposal(f"ffn.{stream}", {path: {"kind": "linear", "size": 0}})


def _ranks(
    spec: StackSpec, stack: StackAnalysis, index: int, streams: Sequence[str], settings: FitConfig
) -> Iterator[Parts]:
    """Low-rank modulation of some streams, once for each set of ranks that the tolerances lead to."""
    seen = set()
    for tolerance in settings.modulation_tolerances:
        ranks = {
            spec.modulation[stream]: [
                rank for rank, missed in enumerate(stack.modulation_residual[stream][index]) if missed <= tolerance
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


class Meter:
    """Measures what proposals save; blocks of one shape save alike, so each kind is measured once.

    Args:
        source: The teacher's blocks.
        calls: The first blocks' calls on a batch, by stack.
        samples: In that batch.
        single: A call on one sample, for the time of whole calls; None leaves the time out.
        flops: Of the whole transformer for one sample.
    """

    def __init__(
        self,
        source: Blocks,
        calls: Mapping[Place, BlockCall],
        samples: int,
        single: dict[str, Any] | None,
        flops: int,
    ) -> None:
        self.source, self.calls, self.samples = source, calls, samples
        self.single, self.flops = single, flops
        self.savings: dict[Any, tuple[int, int]] = {}
        self.whole: dict[Any, int] = {}
        self.times: dict[Any, int] = {}

    def measure(self, stack: str, parts: Parts, block: nn.Module, smaller: nn.Module) -> Saving:
        """Measure what a smaller block saves."""
        call = self.calls[stack, 0]
        shape = (stack, _shapes(block))
        kinds = [(path, part["kind"], label(part)) for path, part in parts.items()]
        alike = (shape, *kinds)
        if shape not in self.whole:
            self.whole[shape] = self._flops(block, call)
        if alike not in self.savings:
            flops = self.whole[shape] - self._flops(smaller, call)
            self.savings[alike] = count_params(block) - count_params(smaller), flops
        if self.single is None or not self.flops:
            return Saving(*self.savings[alike], None)
        # ranks differ from block to block, and make no difference to the time
        like = (shape, *((path, kind, 0 if kind == "low_rank" else size) for path, kind, size in kinds))
        if like not in self.times:
            if isinstance(self.source, ResidentBlocks):
                self.times[like] = self._time(stack, parts, shape[1])
            else:
                self.times[like] = round(self._share(block, smaller, call) * self.whole[shape])
        return Saving(*self.savings[alike], self.times[like])

    def _flops(self, block: nn.Module, call: BlockCall) -> int:
        """FLOPs of a block for one sample."""
        arguments = (call.stack, block, call.inputs, call.arguments)
        return int(count_flops(block, {}, lambda: self.source.adapter.call(*arguments), self.samples)["total"])

    def _time(self, stack: str, parts: Parts, shapes: Any) -> int:
        """Time in FLOPs that one block saves: all blocks of its shape made smaller, on a whole call."""
        blocks, count = [], 0
        for block in self.source.adapter.blocks(self.source.transformer, self.source.stacks[stack]):
            if _shapes(block) == shapes:
                block = shrunk(block, parts)
                count += 1
            blocks.append(block)
        student = with_blocks(self.source.transformer, {stack: blocks})
        share = saved_time(self.source.transformer, student, self.single or {})
        return round(share * self.flops / count)

    def _share(self, block: nn.Module, smaller: nn.Module, call: BlockCall) -> float:
        """The share of its time that a block saves, by itself: what is nowhere whole cannot be timed whole."""
        run = self.source.adapter.call
        calls = [partial(run, call.stack, module, call.inputs, call.arguments) for module in (block, smaller)]
        return _saved_share(calls, self.source.device)


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    return tuple(p.shape for p in block.parameters())


@torch.no_grad()
def saved_time(transformer: nn.Module, student: nn.Module, arguments: dict[str, Any]) -> float:
    """The share of a transformer's time that a student saves.

    Whole calls in turn, and the least of some rounds, since whatever else runs only adds. A module by itself, with its
    weights in the cache, says little about its part of a call that streams all weights. On one CPU thread it is the
    process's own time: another program on the same core would otherwise make one of the two look many times slower.

    Args:
        transformer: The teacher's transformer.
        student: The same with something smaller in all of its blocks.
        arguments: A call on one sample.

    Returns:
        A share, 0 or more and below 1.
    """
    calls = [partial(velocity, model, arguments) for model in (transformer, student)]
    return _saved_share(calls, next(transformer.parameters()).device)


@torch.no_grad()
def _saved_share(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """The share of the first call's time that the second one saves; 0 or more and below 1."""
    clock = time.process_time if torch.get_num_threads() == 1 and device.type == "cpu" else wall_clock

    def seconds(call: Callable[[], Any]) -> float:
        began = clock()
        call()
        return clock() - began

    for call in calls:
        call()  # the first one fills caches
    before, after = (
        min(column) for column in zip(*([seconds(call) for call in calls] for _ in range(ROUNDS)), strict=True)
    )
    return float(min(0.99, max(0.0, 1 - after / before)))
