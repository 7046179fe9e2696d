"""Which units of a module go, and what the closed forms of what stays are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppcl.analysis.findings import Findings
from ppcl.analysis.moments import Moments, add_up
from ppcl.analysis.sweep import Seen
from ppcl.common.progress import announce
from ppcl.common.tables import counted
from ppcl.config import FitConfig
from ppcl.config.extensions import CRITERIA
from ppcl.errors import ConfigError
from ppcl.modules.parts import FAMILIES, join, label
from ppcl.modules.slicing import Units, corrected, features_last, joined, matrix_of
from ppcl.modules.text_stream import plain_norm, text_replacement
from ppcl.pruning.criteria import Site, checked_site_scores, unit_cost, unit_scores
from ppcl.pruning.criteria.base import Batches, InputSums, SumCriterion
from ppcl.pruning.criteria.draws import best_draw, cut_error
from ppcl.pruning.unit_search import CutSite
from ppcl.teacher.blocks import Blocks, Place, ResidentBlocks
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import StackSpec
from ppcl.teacher.families.masks import valid_of, valid_rows
from ppcl.training.distributed import SINGLE, Group

Tensors = dict[str, Tensor]
Parts = dict[str, dict[str, Any]]  # replacements by path
TEXT_RIDGE = 1e-4
KIND = "units"  # of findings


def sizes_of(units: Units, shares: Sequence[float], multiple: int = 64) -> list[int]:
    """How many units the options keep: shares of them, neurons in multiples (``fit.width_multiple``)."""
    step = 1
    while units.kind == "narrow" and step < 64 and step * 16 <= units.count:
        step *= 2
    if units.kind == "narrow":
        step = multiple if multiple > 64 else min(step, multiple)
    sizes = {max(step, round(share * units.count / step) * step) for share in shares}
    return sorted(size for size in sizes if size < units.count)


def choices_of_sizes(kinds: Sequence[Units], settings: FitConfig) -> list[tuple[int, ...]]:
    """How many units of each kind the options of a module keep.

    Where heads and neurons go together, an option cuts both to the same share, or one of them, as ``fit.width`` has it.
    """
    families = [FAMILIES[units.kind] for units in kinds]
    sizes = [
        sizes_of(units, settings.width_shares, settings.width_multiple) if family in settings.width else []
        for units, family in zip(kinds, families, strict=True)
    ]
    alone = [
        tuple(size if i == number else units.count for i, units in enumerate(kinds))
        for number, of_kind in enumerate(sizes)
        for size in of_kind
    ]
    return alone if len(kinds) == 1 else [*alone, *zip(*sizes, strict=False)]


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
    announce(f"criterion {settings.criterion}, {counted(len(sets), 'draw')} of {states[0]} states: {says}")
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
        sites: See :func:`ppcl.pruning.unit_search.find_sites`.
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
    modules, shares = [one for site in sites for one in site.sites], sorted(settings.width_shares)
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
        sites: See :func:`ppcl.pruning.unit_search.find_sites`.
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
        self.here = [site for site in self.sites if site.place == self.place]
        self.norm = _text_norm(stack, block) if self.place in self.texts else None
        paths = [path for site in self.here for path in _readers(site)]
        self.text_path = stack.text_qkv or ""
        return paths if self.norm is None else [*paths, self.text_path]

    def see(self, seen: Seen) -> None:
        """Add a batch."""
        spec, arguments = seen.call.stack, seen.call.arguments
        for path, calls in seen.layers.items():
            x = features_last(self.block.get_submodule(path), calls[-1].input)
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
            parts[site.path], corrections = self._cut(site, {path: moments[path] for path in _readers(site)})
            tensors |= corrections
        if self.norm is not None:
            weight, bias = moments[self.text_path].ridge(TEXT_RIDGE)
            tensors |= {"text_input/weight": weight.float().cpu(), "text_input/bias": bias.float().cpu()}
        if self.group.is_main:
            self.findings.write(KIND, self.place, tensors, parts)
        self.block = nn.Module()

    def _order(self, site: Site, layers: Mapping[str, Moments]) -> list[int]:
        """The units of a site, the best first; of equals the first."""
        if self.scores is None:
            sums = [
                (self._layer(path), InputSums(moments.count, moments.sum_x, moments.xx.diagonal()))
                for path, moments in layers.items()
            ]
            criterion = CRITERIA.named(self.settings.criterion)
            score = checked_site_scores(self.settings.criterion, criterion.score_sums(site, sums), site)
        else:
            score = self.scores[site]
        order: list[int] = torch.argsort(score, descending=True, stable=True).tolist()
        return order

    def _cut(self, site: CutSite, layers: Mapping[str, Moments]) -> tuple[list[dict[str, Any]], Tensors]:
        """The replacements of a module, and the columns of each."""
        orders = [self._order(one, layers) for one in site.sites]
        kinds = [one.units for one in site.sites]
        parts = [
            joined([u.part(sorted(o[:size])) for u, o, size in zip(kinds, orders, sizes, strict=True)])
            for sizes in choices_of_sizes(kinds, self.settings)
        ]
        tensors: Tensors = {}
        for name, (path, moments) in zip(kinds[0].columns, layers.items(), strict=True):
            layer = self._layer(path)
            for part in parts:
                weight, ridge = matrix_of(layer), self.settings.width_ridge
                columns = corrected(weight, layer.bias, part, _moment(moments), ridge, name)
                for kind, value in zip(("weight", "bias"), columns, strict=True):
                    if value is not None:
                        tensors[f"{site.path}/{label(part)}/{name}.{kind}"] = value.to(weight.dtype).cpu()
        return parts, tensors

    def _layer(self, path: str) -> nn.Linear:
        return cast(nn.Linear, self.block.get_submodule(path))


def _readers(site: CutSite) -> list[str]:
    """Paths inside the block of the layers that read a module's units."""
    return [join(site.path, name) for name in site.sites[0].units.columns]


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
