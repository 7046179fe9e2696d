"""Which layers of a block make units, which read them, and where in them each unit lies: found by following NaN.

A unit can be cut where what makes it is read by few layers and by nothing else. So a layer's output is set to NaN for
one call of the block, and every layer that this reaches takes its clean output in its place: those are its readers, and
where the block's own output has NaN the layer feeds more than them. With single features set to NaN the features that
become NaN before a reader tell how they divide: into neurons, or into the heads of an attention. Nothing is taken from
names, and each finding is proved: the block with half of the units cut out must give what it gives with their columns
set to zero.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppcl.common.hooks import removing
from ppcl.modules.parts import FAMILIES, join
from ppcl.modules.replacements import LowRankLinear, apply_width
from ppcl.modules.slicing import Spans, Units, features_last, is_matrix, joined, masked, units_from, usual_spans
from ppcl.modules.text_stream import TextInput
from ppcl.pruning.criteria import Site
from ppcl.teacher.blocks import Blocks, Place
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.trace import BlockCall

logger = logging.getLogger(__name__)
Cuttable = tuple[str, tuple[Units, ...]]  # a module inside a block, and its units
Interval = tuple[int, int]  # first feature, and behind the last
UNFIT = (RuntimeError, ValueError, IndexError, TypeError)  # a shape or a number that the block's code takes for granted


@dataclass
class Reach:
    """What NaN came to in one call of a block.

    Attributes:
        layers: Layers with matrices that were given it, and in which of their features, (features,).
        norms: What else has weights and was given it.
        leaks: The block returned it.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    leaks: bool = False


class Probe:
    """Runs a block with NaN put in here and there.

    Args:
        adapter: Its family.
        spec: Its stack.
        block: It is left as it is.
        call: A recorded call of a block of this stack.
    """

    def __init__(self, adapter: Adapter, spec: StackSpec, block: nn.Module, call: BlockCall) -> None:
        self.adapter, self.spec, self.block, self.call = adapter, spec, block, call
        weighted = {name: m for name, m in block.named_modules() if next(m.parameters(recurse=False), None) is not None}
        self.matrices = {n: m for n, m in weighted.items() if n and _has_matrix(m)}
        self.norms = {n: m for n, m in weighted.items() if n and n not in self.matrices and not list(m.children())}
        self.clean: dict[str, list[Any]] = {name: [] for name in self.matrices | self.norms}
        layers = (self.matrices | self.norms).items()
        with removing(layer.register_forward_hook(self._note(name)) for name, layer in layers):
            self._run(call.inputs)

    def from_states(self) -> Reach:
        """NaN in all states that enter the block."""
        return self._follow({}, {stream: torch.full_like(x, torch.nan) for stream, x in self.call.inputs.items()})

    def from_layer(self, name: str, features: Interval | None = None) -> Reach:
        """NaN in what a layer gives, or in some features of it."""
        return self._follow({name: features}, self.call.inputs)

    def width(self, name: str) -> int:
        """Features that a layer gives."""
        return len(self.matrices[name].get_parameter("weight"))

    def _run(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # others drop NaN: to them its row is one that sees nothing
            outputs = self.adapter.call(self.spec, self.block, dict(states), self.call.arguments)
        return [state for state in outputs.values() if isinstance(state, Tensor)]

    def _note(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.clean[name].append(copy.deepcopy(output))

        return hook

    def _follow(self, poisoned: Mapping[str, Interval | None], states: Mapping[str, Tensor]) -> Reach:
        reach, calls = Reach(), dict.fromkeys(self.clean, 0)

        def watch(name: str) -> Callable[..., Any]:
            def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                number, calls[name] = calls[name], calls[name] + 1
                if name in poisoned:
                    return _poisoned(layer, output, poisoned[name])
                given = args[0] if args else None
                if not isinstance(given, Tensor) or not bool(given.isnan().any()):
                    return None
                if name in self.norms:
                    reach.norms.add(name)
                    if given.shape != output.shape:
                        return None
                    return torch.where(given.isnan(), given, self.clean[name][number])  # each feature for itself
                seen = features_last(layer, given).isnan().flatten(0, -2).any(0)
                reach.layers[name] = seen | reach.layers.get(name, torch.zeros_like(seen))
                return copy.deepcopy(self.clean[name][number])

            return hook

        with removing(m.register_forward_hook(watch(n)) for n, m in (self.matrices | self.norms).items()):
            reach.leaks = any(bool(state.isnan().any()) for state in self._run(states))
        return reach


def _poisoned(layer: nn.Module, output: Any, features: Interval | None) -> Any:
    if not isinstance(output, Tensor):
        return type(output)(_poisoned(layer, part, features) for part in output)
    output = output.clone()
    first, last = features or (0, None)
    features_last(layer, output)[..., first:last] = torch.nan
    return output


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module mixes features; a norm and a depthwise convolution do not."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return False
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


@dataclass(frozen=True)
class CutSite:
    """A module that can lose units.

    Attributes:
        group: Of its options: ``ffn.image``, ``attention``; ``parallel`` with heads and neurons.
        sites: The module, once for each kind of its units.
    """

    group: str
    sites: tuple[Site, ...]

    @property
    def path(self) -> str:
        """The module inside its block."""
        return self.sites[0].path

    @property
    def place(self) -> Place:
        """Its block."""
        return self.sites[0].stack, self.sites[0].block


def find_sites(source: Blocks, calls: Mapping[Place, BlockCall], groups: Sequence[str]) -> list[CutSite]:
    """Find the modules whose units may go, and prove that they can.

    Args:
        source: The teacher's blocks.
        calls: A recorded call of the first block of each stack.
        groups: ``ffn`` and ``attention`` are looked for.
    """
    sites: list[CutSite] = []
    if not {"ffn", "attention"} & set(groups):
        return sites
    for spec in source.adapter.stacks:
        known: dict[Any, list[Cuttable]] = {}  # of blocks of one shape the first is looked at
        for index, block in enumerate(source.adapter.blocks(source.transformer, spec)):
            shape = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
            if shape not in known:
                with source.block(spec.name, index) as lent:
                    known[shape] = list(_proved(source.adapter, spec, lent, calls[spec.name, 0]))
            for group, path, kinds in grouped(spec.of(block), known[shape], groups):
                sites.append(CutSite(group, tuple(Site(spec.name, index, path, units) for units in kinds)))
    return sites


def _proved(adapter: Adapter, spec: StackSpec, block: nn.Module, call: BlockCall) -> Iterator[Cuttable]:
    for path, kinds in find_units(adapter, spec, block, call):
        reason = why_not_cut(adapter, spec, block, path, kinds, call)
        if not reason:
            yield path, kinds
            continue
        what = " and ".join("neurons" if units.kind == "narrow" else units.kind for units in kinds)
        logger.warning("%s: fewer %s are not offered: %s", join(spec.name, path), what, reason)


def grouped(
    spec: StackSpec, found: Sequence[Cuttable], groups: Sequence[str]
) -> Iterator[tuple[str, str, tuple[Units, ...]]]:
    """Group, path and units of what was found in a block, as far as the groups ask for it."""
    streams = {path: stream for stream, path in spec.ffn.items()}
    kind_of = {path: "+".join(FAMILIES[units.kind] for units in kinds) for path, kinds in found}
    for path, kinds in found:
        family = kind_of[path]
        wanted = tuple(units for units in kinds if FAMILIES[units.kind] in groups)
        if not wanted:
            continue
        if len(kinds) > 1:
            yield "parallel", path, kinds
        elif family == "ffn":
            yield join("ffn", streams.get(path, "" if list(kind_of.values()).count("ffn") == 1 else path)), path, kinds
        else:
            several = list(kind_of.values()).count("attention") > 1
            yield join("attention", path if several else ""), path, kinds


@torch.no_grad()
def find_units(adapter: Adapter, spec: StackSpec, block: nn.Module, call: BlockCall) -> list[Cuttable]:
    """Find the modules of a block whose units can be cut, by a call of it.

    Args:
        adapter: The family.
        spec: The block's stack.
        block: It is left as it is.
        call: A recorded call of a block of this stack.

    Returns:
        Path inside the block and units of each: of one kind, or heads and neurons that one layer reads together. None
        of them is proved yet (:func:`why_not_cut`).
    """
    probe = Probe(adapter, spec, block, call)
    entered = probe.from_states().layers
    reached = {name: probe.from_layer(name) for name in probe.matrices}
    small = [f"{name}." for name, m in block.named_modules() if isinstance(m, TextInput | LowRankLinear)]
    cuttable = {n for n, m in probe.matrices.items() if is_matrix(m) and not any(map(n.startswith, small))}
    found = []
    for columns, rows in _closed(reached):
        if not cuttable >= {*rows, *columns} or not set(rows) & set(entered):
            continue
        kinds = _units(probe, rows, columns, {row: reached[row].norms for row in rows})
        if kinds:
            parents = {row.rpartition(".")[0] for row in rows}
            unread = [n for n, reach in reached.items() if not reach.layers and not reach.leaks and probe.clean[n]]
            beside = [n for n in unread if n.rpartition(".")[0] in parents and n in cuttable]
            if len(kinds) == 1:  # what nobody reads any more (queries of a text that is two linear maps) goes along
                kinds = [replace(kinds[0], rows=(*kinds[0].rows, *beside))]
            found.append(_placed(kinds, set(probe.matrices)))
    return found


def _closed(reached: Mapping[str, Reach]) -> Iterator[tuple[list[str], list[str]]]:
    """Columns and rows of each set of layers whose outputs are read by those columns, and by nothing else."""
    sources: dict[str, set[str]] = {}
    for name, reach in reached.items():
        for reader in reach.layers:
            sources.setdefault(reader, set()).add(name)
    done: set[str] = set()
    for first in sources:
        columns, rows = {first}, set(sources[first])
        while True:
            more = {reader for row in rows for reader in reached[row].layers}
            feeding = {row for column in more for row in sources[column]}
            if more == columns and feeding == rows:
                break
            columns, rows = columns | more, rows | feeding
        if first not in done and not columns & rows and not any(reached[row].leaks for row in rows):
            yield ([name for name in reached if name in columns], [name for name in reached if name in rows])
        done |= columns


@dataclass(frozen=True)
class _Segment:
    """Consecutive features of a layer and what they reach: so many of them (``share``) a stretch of ``width``."""

    first: int
    last: int
    share: int
    start: int
    width: int

    @property
    def end(self) -> int:
        return self.start + (self.last - self.first) // self.share * self.width

    def split(self, edges: set[int]) -> list[_Segment]:
        """Where single features follow those of another kind, the two look like one."""
        inner = sorted(edge for edge in edges if self.start < edge < self.end) if self.width == 1 else []
        ends = [self.start, *inner, self.end]
        return (
            [
                replace(self, first=self.first + a - self.start, last=self.first + b - self.start, start=a)
                for a, b in pairwise(ends)
            ]
            if inner
            else [self]
        )


def _units(
    probe: Probe, rows: Sequence[str], columns: Sequence[str], norms: Mapping[str, set[str]]
) -> list[Units] | None:
    """The units that rows make and columns read; None where they do not divide."""
    read = {probe.matrices[name].get_parameter("weight").shape[1] for name in columns}
    if len(read) > 1:
        return None
    (features,) = read
    segments = {row: _segments(probe, row, features) for row in rows}
    if not all(segments.values()):
        return None
    edges = {edge for found in segments.values() for segment in found for edge in (segment.start, segment.end)}
    segments = {row: [part for segment in found for part in segment.split(edges)] for row, found in segments.items()}
    pools: dict[Interval, int] = {}  # where kinds of units lie before a column, and their width there
    for segment in (segment for found in segments.values() for segment in found):
        place = (segment.start, segment.end)
        pools[place] = max(segment.width, pools.get(place, 1))
    places = sorted(pools)
    if [place[0] for place in places] + [features] != [0, *(place[1] for place in places)] or len(places) > 2:
        return None
    kinds = []
    for (start, end), width in ((place, pools[place]) for place in places):
        count, kind = (end - start) // width, "narrow" if width == 1 else "heads"
        spans: dict[str, Spans] = {name: ((start, width),) for name in columns}
        for row in rows:
            here = [s for s in segments[row] if (s.start, s.end) == (start, end)]
            if here:
                spans[row] = tuple((s.first, s.share * width // s.width) for s in here)
        between = {
            norm: spans[row] for row in spans if row in rows for norm in norms[row] if _is_wide(probe, row, norm)
        }
        widths = {n: features if n in columns else probe.width(n) for n in spans}
        widths |= {norm: probe.norms[norm].get_parameter("weight").shape[0] for norm in between}
        unusual = tuple(
            (n, s)
            for n, s in (spans | between).items()
            if widths[n] % count or s != usual_spans(kind, count, widths[n])
        )
        made = tuple(row for row in rows if row in spans)
        if count > 1 and made:
            kinds.append(Units(kind, count, made, tuple(columns), tuple(between), unusual))
    return kinds if len({units.kind for units in kinds}) == len(kinds) else None


def _is_wide(probe: Probe, row: str, norm: str) -> bool:
    return len(probe.norms[norm].get_parameter("weight")) == probe.width(row)


def _segments(probe: Probe, row: str, features: int) -> list[_Segment]:
    """Divide a layer's features by what they reach of the ``features`` before its readers; empty if they do not."""
    found: list[_Segment] = []
    first, total = 0, probe.width(row)
    while first < total:
        segment = _segment(probe, row, first, total, features)
        if segment is None or len(found) == 8:
            return []
        found.append(segment)
        first = segment.last
    return found


def _segment(probe: Probe, row: str, first: int, total: int, features: int) -> _Segment | None:
    """The longest segment from one feature on."""
    reached = _reached(probe, row, first)
    if not reached:
        return None
    start, stride = reached[0], reached[1] - reached[0] if len(reached) > 1 else 1
    width = stride * len(reached)  # several heads read one value: its features lie apart in theirs

    def reaches(feature: int, unit: int, offset: int) -> bool:
        begin = start + unit * width + (offset if stride > 1 else 0)
        return _reached(probe, row, feature) == list(range(begin, begin + width, stride))

    divisors = [s for s in range(width, 0, -1) if width % s == 0 and first + s <= total] if stride == 1 else [stride]
    share = next((s for s in divisors if reaches(first + s - 1, 0, s - 1)), None)
    if share is None:
        return None

    def fits(last: int) -> bool:
        """Whether the unit before this feature reaches what follows from the first one's."""
        return reaches(last - 1, (last - first) // share - 1, share - 1)

    low, high = 1, min((total - first) // share, (features - start) // width)
    if not fits(first + high * share):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(first + middle * share) else (low, middle)
        high = low
    return _Segment(first, first + high * share, share, start, width)


def _reached(probe: Probe, row: str, feature: int) -> list[int]:
    """The features that one feature of a layer reaches, over all its readers."""
    seen = list(probe.from_layer(row, (feature, feature + 1)).layers.values())
    reached: list[int] = torch.stack(seen).any(0).nonzero()[:, 0].tolist() if seen else []
    return reached


def _placed(kinds: Sequence[Units], matrices: set[str]) -> Cuttable:
    """The outermost module that has these layers alone, or the innermost that has them, and paths inside it."""
    names = [name for units in kinds for name in (*units.rows, *units.columns, *units.between)]
    parents = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(p) > depth and p[depth] == parents[0][depth] for p in parents):
        depth += 1
    for outer in range(depth - 1, 0, -1):
        if {n for n in matrices if n.startswith(".".join(parents[0][:outer]) + ".")} <= set(names):
            depth = outer
    path = ".".join(parents[0][:depth])

    def inside(paths: Sequence[str]) -> tuple[str, ...]:
        return tuple(name.removeprefix(f"{path}.") if path else name for name in paths)

    return path, tuple(
        Units(
            units.kind,
            units.count,
            inside(units.rows),
            inside(units.columns),
            inside(units.between),
            tuple(zip(inside([name for name, _ in units.spans]), (spans for _, spans in units.spans), strict=True)),
        )
        for units in kinds
    )


@torch.no_grad()
def why_not_cut(
    adapter: Adapter, spec: StackSpec, block: nn.Module, path: str, units: Sequence[Units], call: BlockCall
) -> str:
    """Why a block without half of the units does not give what it gives with their columns zeroed; empty if it does."""
    part = joined([kind.part(range(0, kind.count, 2)) for kind in units])
    changed = [copy.deepcopy(block), copy.deepcopy(block)]
    try:
        _replace(changed[0], path, masked(block.get_submodule(path), part))
        apply_width(changed[1], {path: part})
        _weigh_norms(block.get_submodule(path), changed[1].get_submodule(path), part)
        outputs = [adapter.call(spec, b, call.inputs, call.arguments) for b in (block, *changed)]
    except UNFIT:
        return "its code has something of its own for each"
    for whole, zeroed, cut in zip(*(states.values() for states in outputs), strict=True):
        if zeroed is not None:
            rounding = 4 * torch.finfo(zeroed.dtype).eps * float(zeroed.float().norm())
            if not float((cut - zeroed).float().norm()) <= 0.05 * float((zeroed - whole).float().norm()) + rounding:
                return "each depends on all others"
    return ""


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    state = {f"{path}.{name}" if path else name: value for name, value in module.state_dict().items()}
    block.load_state_dict(state, strict=False)


def _weigh_norms(whole: nn.Module, cut: nn.Module, part: Mapping[str, Any]) -> None:
    """A norm over all heads sees zeros in the one block and fewer features in the other: make up for their number."""
    for name in {name for units in units_from(part) for name in units.between}:
        weight, fewer = (module.get_submodule(name).get_parameter("weight") for module in (whole, cut))
        if weight.ndim == 1:
            fewer.mul_((len(weight) / len(fewer)) ** 0.5)
