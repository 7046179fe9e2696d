"""Which modules can lose units, which units go, and what their closed forms are.

A module is offered only where cutting a unit out of it gives what the block gives with the
unit's columns set to zero, on a recorded call: that holds for ordinary feed-forward networks and
attentions and is not taken from their names.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.findings import Findings
from ppcl.analysis.moments import Moments, add_up
from ppcl.analysis.sweep import Seen
from ppcl.common.progress import announce
from ppcl.config import FitConfig
from ppcl.config.extensions import CRITERIA
from ppcl.errors import ConfigError
from ppcl.modules.replacements import set_module
from ppcl.modules.slicing import Units, corrected, heads_of, masked, neurons_of, sliced
from ppcl.modules.text_stream import plain_norm, text_replacement
from ppcl.pruning.criteria import Site, checked_site_scores, unit_cost, unit_scores
from ppcl.pruning.criteria.base import Batches, InputSums, SumCriterion
from ppcl.pruning.criteria.draws import best_draw, cut_error
from ppcl.teacher.blocks import Blocks, Place, ResidentBlocks
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.families.masks import valid_of, valid_rows
from ppcl.teacher.trace import BlockCall
from ppcl.training.distributed import SINGLE, Group

logger = logging.getLogger(__name__)
Calls = Mapping[Place, BlockCall]
Tensors = dict[str, Tensor]
Parts = dict[str, dict[str, Any]]  # replacements by path
TEXT_RIDGE = 1e-4
KIND = "units"  # of findings


@dataclass(frozen=True)
class CutSite:
    """A module that can lose units.

    Attributes:
        group: Of its options: ``ffn.image``, ``attention``.
        site: The module.
    """

    group: str
    site: Site

    def layers(self, block: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers that read the units, by path inside the module, given its block."""
        module = block.get_submodule(self.site.path)
        layers = {name: module.get_submodule(name) for name in self.site.units.columns}
        return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def find_sites(source: Blocks, calls: Calls, groups: Sequence[str]) -> list[CutSite]:
    """Find the modules whose units may go.

    Args:
        source: The teacher's blocks.
        calls: A recorded call of the first block of each stack.
        groups: ``ffn`` and ``attention`` are looked for.
    """
    sites: list[CutSite] = []
    for spec in source.adapter.stacks:
        refused: dict[str, bool] = {}  # by group: tested on the first block that has it
        for index, block in enumerate(source.adapter.blocks(source.transformer, spec)):
            for group, path, units in units_of(spec, block, groups):
                if group not in refused:
                    with source.block(spec.name, index) as lent:
                        clean = cuts_cleanly(source.adapter, spec, lent, path, units, calls[spec.name, 0])
                    refused[group] = not clean
                    if refused[group]:
                        logger.warning("%s.%s: %s cannot be cut here; not offered", spec.name, path, units.kind)
                if not refused[group]:
                    sites.append(CutSite(group, Site(spec.name, index, path, units)))
    return sites


def units_of(spec: StackSpec, block: nn.Module, groups: Sequence[str]) -> Iterator[tuple[str, str, Units]]:
    """Group, path and units of the modules of one block."""
    if "ffn" in groups:
        for stream, path in spec.of(block).ffn.items():
            units = neurons_of(block.get_submodule(path))
            if units is not None:
                yield f"ffn.{stream}", path, units
    if "attention" in groups:
        named = {name: heads_of(child) for name, child in block.named_children()}
        several = sum(units is not None for units in named.values()) > 1
        for name, units in named.items():
            if units is not None:
                yield f"attention.{name}" if several else "attention", name, units


@torch.no_grad()
def cuts_cleanly(adapter: Adapter, spec: StackSpec, block: nn.Module, path: str, units: Units, call: BlockCall) -> bool:
    """Whether a block without half of the units gives what it gives with their columns zeroed."""
    part = units.part(range(0, units.count, 2))
    outputs = [adapter.call(spec, block, call.inputs, call.arguments)]
    for make in (masked, sliced):
        changed = copy.deepcopy(block)
        set_module(changed, path, make(block.get_submodule(path), part))
        try:
            outputs.append(adapter.call(spec, changed, call.inputs, call.arguments))
        except (RuntimeError, ValueError, IndexError):  # a shape that the block's code takes for granted
            return False
    for whole, zeroed, cut in zip(*(states.values() for states in outputs), strict=True):
        if zeroed is not None:
            rounding = 4 * torch.finfo(zeroed.dtype).eps * float(zeroed.float().norm())
            if float((cut - zeroed).float().norm()) > 0.05 * float((zeroed - whole).float().norm()) + rounding:
                return False
    return True


def sizes_of(units: Units, shares: Sequence[float], multiple: int = 64) -> list[int]:
    """How many units the options keep: shares of them, neurons in multiples (``fit.width_multiple``)."""
    step = 1
    while units.kind == "narrow" and step < 64 and step * 16 <= units.count:
        step *= 2
    if units.kind == "narrow":
        step = multiple if multiple > 64 else min(step, multiple)
    sizes = {max(step, round(share * units.count / step) * step) for share in shares}
    return sorted(size for size in sizes if size < units.count)


def criterion_cost(settings: FitConfig, sets: Sequence[Batches], held_out: Batches) -> float | None:
    """What choosing units costs, in runs of the teacher on one state; it is said before anything starts.

    Args:
        settings: ``criterion``.
        sets: Calibration sets; of several each is tried on the held-out states.
        held_out: Those states.

    Returns:
        The number; None where a criterion from outside does not say.
    """
    states = [sum(map(batch_size, batches)) for batches in sets]
    cost = unit_cost(settings.criterion, sum(states))
    if cost is not None and len(sets) > 1:
        cost += 2 * len(sets) * sum(map(batch_size, held_out))
    says = "it does not say what it costs" if cost is None else f"{cost:,.0f} runs of the teacher on one state"
    announce(f"criterion {settings.criterion}, {len(sets)} draw(s) of {states[0]} states: {says}")
    return cost


def scores_of_all(
    source: Blocks,
    sites: Sequence[CutSite],
    sets: Sequence[Batches],
    settings: FitConfig,
    seed: int,
    held_out: Batches = (),
) -> dict[Site, Tensor] | None:
    """Score all units before the sweep, by a criterion that runs the whole transformer.

    Args:
        source: The teacher's blocks.
        sites: See :func:`find_sites`.
        sets: Sets of training states; of several the best is taken (:mod:`ppcl.pruning.criteria.draws`).
        settings: ``criterion`` and ``width_shares``.
        seed: For the criterion.
        held_out: States that say which of the sets is best.

    Returns:
        (units,) of each site; None where :class:`UnitSums` can score by itself.

    Raises:
        ConfigError: It would, and blocks are read from files.
    """
    criterion = CRITERIA.named(settings.criterion)
    if len(sets) == 1 and isinstance(criterion, SumCriterion):
        return None
    if not isinstance(source, ResidentBlocks):
        raise ConfigError(
            f"fit.criterion={settings.criterion} with fit.criterion_draws={len(sets)} looks at all blocks' weights at "
            "once, and they are read from files one by one; use fit.criterion=activation with one draw, or "
            "blocks=resident on a device that holds the teacher"
        )
    modules, shares = [site.site for site in sites], sorted(settings.width_shares)
    adapter = source.adapter
    with source.whole() as transformer:
        scores = best_draw(
            lambda states: unit_scores(settings.criterion, transformer, adapter, modules, states, seed),
            lambda scores: cut_error(transformer, adapter, modules, scores, shares[len(shares) // 2], held_out),
            list(sets),
        )
    return dict(zip(modules, scores, strict=True))


def text_blocks(source: Blocks, probes: Collection[str]) -> dict[Place, Parts]:
    """The blocks whose text stream can become two linear maps, and the replacements.

    Args:
        source: The teacher's blocks.
        probes: Names of what the analyze stage wrote, l_h among it, the text's probe.
    """
    replacements: dict[Place, Parts] = {}
    for spec in source.adapter.stacks:
        for index, block in enumerate(source.adapter.blocks(source.transformer, spec) if spec.text_parts else ()):
            known, parts = f"{spec.name}/{index}/text/weight" in probes, spec.of(block).text_parts
            if spec.text_qkv and known and parts and _text_norm(spec, block) is not None:
                replacements[spec.name, index] = {path: {"kind": kind, "size": 0} for path, kind in parts.items()}
    return replacements


class UnitSums:
    """A consumer of the forward sweep: which units of a block stay, the columns that read them, and the text's l_z.

    Args:
        sites: See :func:`find_sites`.
        texts: The blocks whose text input map is wanted.
        settings: ``criterion``, ``width_shares`` and ``width_ridge``.
        scores: Of the units; None: by the criterion, from the sums of this sweep.
        findings: Receives ``path/kind-size/layer.weight|bias`` and ``text_input/weight|bias`` (x W + b with
            x = Norm(h)) of each block, and the replacements of each site, one a size.
        group: The processes that sweep.
    """

    def __init__(
        self,
        sites: Sequence[CutSite],
        texts: Collection[Place],
        settings: FitConfig,
        scores: Mapping[Site, Tensor] | None,
        findings: Findings,
        group: Group = SINGLE,
    ) -> None:
        self.sites, self.texts, self.settings = sites, texts, settings
        self.scores, self.findings, self.group = scores, findings, group
        self.place: Place = ("", 0)
        self.block = nn.Module()
        self.here: list[CutSite] = []
        self.norm: nn.LayerNorm | None = None
        self.text_path = ""
        self.moments: dict[str, Moments] = {}

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """The layers that read units, and the text's projection."""
        self.place, self.block, self.moments = (stack.name, index), block, {}
        self.here = [site for site in self.sites if (site.site.stack, site.site.block) == self.place]
        self.norm = _text_norm(stack, block) if self.place in self.texts else None
        paths = [f"{site.site.path}.{name}" for site in self.here for name in site.layers(block)]
        self.text_path = stack.text_qkv or ""
        return paths if self.norm is None else [*paths, self.text_path]

    def see(self, seen: Seen) -> None:
        """Add a batch."""
        spec, arguments = seen.call.stack, seen.call.arguments
        for path, calls in seen.layers.items():
            x = calls[-1].input
            valid = valid_of(spec, arguments, path, x)
            rows = valid_rows(x, valid)
            if self.norm is not None and path == self.text_path:
                states = self.norm(spec.turn(seen.call.inputs["text"]))
                self._add(path, valid_rows(states, valid), rows)
            else:
                self._add(path, rows, rows[:, :0])

    def _add(self, path: str, x: Tensor, y: Tensor) -> None:
        if path not in self.moments:
            self.moments[path] = Moments(x.shape[-1], y.shape[-1], x.device)
        self.moments[path].update(x, y)

    def finish(self) -> None:
        """Solve, and write."""
        moments = add_up(self.moments, self.group)
        self.moments = {}
        tensors: Tensors = {}
        parts: dict[str, list[dict[str, Any]]] = {}
        for site in self.here:
            layers = {
                name: (layer, moments[f"{site.site.path}.{name}"]) for name, layer in site.layers(self.block).items()
            }
            parts[site.site.path], corrections = self._cut(site.site, layers)
            tensors |= corrections
        if self.norm is not None:
            weight, bias = moments[self.text_path].ridge(TEXT_RIDGE)
            tensors |= {"text_input/weight": weight.float().cpu(), "text_input/bias": bias.float().cpu()}
        if self.group.is_main:
            self.findings.write(KIND, self.place, tensors, parts)
        self.block = nn.Module()

    def _cut(self, site: Site, layers: Mapping[str, tuple[nn.Linear, Moments]]) -> tuple[list[dict[str, Any]], Tensors]:
        """The replacements of a site, and the columns of each."""
        if self.scores is None:
            sums = [
                (layer, InputSums(moments.count, moments.sum_x, moments.xx.diagonal()))
                for layer, moments in layers.values()
            ]
            criterion = CRITERIA.named(self.settings.criterion)
            score = checked_site_scores(self.settings.criterion, criterion.score_sums(site, sums), site)
        else:
            score = self.scores[site]
        order = torch.argsort(score, descending=True, stable=True).tolist()  # of equals the first stays
        sizes = sizes_of(site.units, self.settings.width_shares, self.settings.width_multiple)
        parts = [site.units.part(sorted(order[:size])) for size in sizes]
        tensors: Tensors = {}
        for name, (layer, moments) in layers.items():
            for part in parts:
                columns = corrected(layer.weight, layer.bias, part, _moment(moments), self.settings.width_ridge)
                for kind, value in zip(("weight", "bias"), columns, strict=True):
                    if value is not None:
                        prefix = f"{site.path}/{part['kind']}-{part['size']}/{name}"
                        tensors[f"{prefix}.{kind}"] = value.to(layer.weight.dtype).cpu()
        return parts, tensors


def _moment(moments: Moments) -> tuple[Tensor, Tensor]:
    mean = moments.sum_x / moments.count
    return mean, moments.xx / moments.count - torch.outer(mean, mean)


def _text_norm(spec: StackSpec, block: nn.Module) -> nn.LayerNorm | None:
    """The LayerNorm before the text's projections, if all parts of the text stream can be replaced."""
    norm = None
    for path, kind in spec.text_parts.items():
        try:
            module = block.get_submodule(path)
        except AttributeError:
            return None
        if text_replacement(module, kind) is None:
            return None
        if kind == "text_input":
            norm = plain_norm(module)
    return norm
