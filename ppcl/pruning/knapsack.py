"""Depth and width under one budget: which runs become one block, which modules become smaller.

A graph over a line of blocks: an edge is something smaller in the place of some blocks, which saves something and costs
a squared velocity error; the teacher's own blocks are free. A model is a path; as far as squares add, its cost is the
sum of its edges'. One dynamic programme over the blocks finds the cheapest paths for every class of savings
(:class:`CheapestPaths`); plans, sizes of a bundle and path search all ask it. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ppcl.modules.parts import changed
from ppcl.pruning.artifacts import Candidate, WidthOption
from ppcl.student.plan import Segment, start_index
from ppcl.student.prediction import SHARE, adding, padded, together, unbounded
from ppcl.teacher.model_info import ModelInfo, Stack

CLASSES = 1000  # of savings, from nothing to the whole model
DEPTH_CLASSES = 10_000  # of depth alone, where few savings differ: so many that hardly two share a class
Parts = Mapping[str, Mapping[str, Any]]  # replacements by path
Layout = dict[str, tuple[Segment, ...]]
Route = tuple[int, ...]  # numbers of edges, in execution order


@dataclass(frozen=True)
class Edge:
    """Something smaller in the place of blocks first..last.

    Attributes:
        first: First block, numbered through all stacks.
        last: Last block, inclusive.
        saved: What it saves, in the budget's unit.
        cost: Sum of what adds up of the squared relative velocity errors of its run and its smaller modules
            (:func:`ppcl.student.prediction.unbounded`).
        stack: Its stack.
        segment: What it is in a plan.
        alone: What adds up of it alone: of what is in it taken together.
        vector: How it moves the velocity, as that adds up (:func:`ppcl.student.prediction.adding`).
    """

    first: int
    last: int
    saved: float
    cost: float
    stack: str
    segment: Segment
    alone: float
    vector: tuple[float, ...] = ()

    @property
    def place(self) -> tuple[str, int, int]:
        """Its stack, and the first and last block there."""
        return self.stack, self.segment.first, self.segment.last


class _Ways(NamedTuple):
    """Ways to a node, one an entry: cost, savings, the way before it at its edge's first node, the edge (-1: none)."""

    cost: np.ndarray
    saved: np.ndarray
    before: np.ndarray
    edge: np.ndarray


class CheapestPaths:
    """The cheapest paths of each class of savings, by dynamic programming over nodes and classes.

    With many different savings they are approximate: at a node, of paths that saved about the same only the cheapest
    ``count`` go on.

    Args:
        num_blocks: Of all stacks together.
        edges: None crosses the border of two stacks.
        unit: Width of a class of savings.
        count: Paths that are kept of each class.
        border: Savings at which a class begins.
        usable: Edges that may be used; all if None.
        filled: Blocks that may not stay as they are.

    Attributes:
        cost: Of each path, (paths,), from the lowest class on and inside a class from the cheapest on.
        saved: Its savings, (paths,).
    """

    def __init__(
        self,
        num_blocks: int,
        edges: Sequence[Edge],
        unit: float,
        count: int = 1,
        border: float = 0.0,
        usable: Collection[int] | None = None,
        filled: Collection[int] = (),
    ) -> None:
        self._edges, self._unit, self._count, self._border = edges, unit, count, border
        by_first: dict[int, list[int]] = {}
        for number in range(len(edges)) if usable is None else sorted(usable):
            by_first.setdefault(edges[number].first, []).append(number)
        start = _Ways(*np.zeros((2, 1)), *np.full((2, 1), -1))
        nothing = _Ways(*np.zeros((2, 0)), *np.zeros((2, 0), dtype=int))
        arriving: list[list[_Ways]] = [[start], *([nothing] for _ in range(num_blocks))]
        self._at: list[_Ways] = []
        for position in range(num_blocks + 1):
            here = self._best(_Ways(*map(np.concatenate, zip(*arriving[position], strict=True))))
            arriving[position] = []
            self._at.append(here)
            index = np.arange(len(here.cost))
            if position < num_blocks and position not in filled:
                arriving[position + 1].append(_Ways(here.cost, here.saved, index, np.full(len(index), -1)))
            for number in by_first.get(position, ()):
                edge = edges[number]
                ways = _Ways(here.cost + edge.cost, here.saved + edge.saved, index, np.full(len(index), number))
                arriving[edge.last + 1].append(ways)
        self.cost, self.saved = self._at[-1].cost, self._at[-1].saved

    def _best(self, ways: _Ways) -> _Ways:
        """Of the ways to a node the cheapest of each class; of equals the first."""
        classes = np.floor((ways.saved - self._border) / self._unit)
        order = np.lexsort((ways.cost, classes))
        first = np.flatnonzero(np.diff(classes[order], prepend=-np.inf))
        sizes = np.diff(np.append(first, len(order)))
        rank = np.arange(len(order)) - np.repeat(first, sizes)
        kept = order[rank < self._count]
        return _Ways(*(values[kept] for values in ways))

    def route(self, index: int) -> Route:
        """Follow a path back to the first node."""
        numbers: list[int] = []
        position = len(self._at) - 1
        while position:
            number = int(self._at[position].edge[index])
            index = int(self._at[position].before[index])
            numbers += [number] if number >= 0 else []
            position = self._edges[number].first if number >= 0 else position - 1
        return tuple(reversed(numbers))


def best_routes(model: ModelInfo, edges: Sequence[Edge], by_flops: bool, classes: int = CLASSES) -> list[Route]:
    """Return the cheapest path for each class of savings.

    Args:
        model: The teacher.
        edges: What may stand in the place of its blocks.
        by_flops: What edges save is time, not parameters.
        classes: How many classes of savings are told apart.

    Returns:
        Paths, from nothing saved to as much as possible.
    """
    whole = model.flops if by_flops and model.flops else model.params  # edges save parameters where no FLOPs are known
    unit = max(1.0, whole / classes)
    paths = CheapestPaths(sum(stack.num_blocks for stack in model.stacks), edges, unit)
    return [paths.route(index) for index in range(len(paths.cost))]


def best_layouts(model: ModelInfo, edges: Sequence[Edge], by_flops: bool, classes: int = CLASSES) -> list[Layout]:
    """:func:`best_routes` as layouts."""
    routes = best_routes(model, edges, by_flops, classes)
    return [layout_of(model, [edges[number] for number in route]) for route in routes]


def layout_of(model: ModelInfo, edges: Iterable[Edge], base: Iterable[Edge] = ()) -> Layout:
    """The segments of a path: its edges', and between them those of ``base``, or else the teacher's own blocks."""
    between = {(edge.stack, edge.segment.first): edge.segment for edge in base}
    by_first = between | {(edge.stack, edge.segment.first): edge.segment for edge in edges}
    layout: Layout = {}
    for stack in model.stacks:
        segments, position = [], 0
        while position < stack.num_blocks:
            segments.append(by_first.get((stack.name, position), Segment(position, position)))
            position = segments[-1].last + 1
        layout[stack.name] = tuple(segments)
    return layout


def edges_of(
    model: ModelInfo,
    runs: Sequence[Candidate],
    options: Sequence[WidthOption],
    by_flops: bool,
    vectors: Vectors | None = None,
) -> list[Edge]:
    """Everything that may stand for blocks; of the choices of smaller modules only the undominated ones.

    Args:
        model: The teacher.
        runs: Allowed runs; those without a finite cost are left out.
        options: Allowed smaller modules.
        by_flops: Save time instead of parameters: FLOPs of blocks, and what was measured of smaller modules.
        vectors: How each of them moves the velocity, by its name.
    """
    edges: list[Edge] = []
    offset = 0
    for stack in model.stacks:
        by_block: dict[int, list[WidthOption]] = {i: [] for i in range(stack.num_blocks)}
        by_first: dict[int, list[Candidate]] = {i: [] for i in range(stack.num_blocks)}
        for option in options:
            if option.stack == stack.name:
                by_block[option.block].append(option)
        for run in runs:
            if run.stack == stack.name and math.isfinite(run.cost):
                by_first[run.first].append(run)
        for index in range(stack.num_blocks):
            kept = Segment(index, index)
            choices = choices_of(by_block[index], by_flops)
            filled = [put_in(kept, None, choice, vectors) for choice in choices]
            for run in by_first[index]:
                # a substitute carries several blocks' work: it keeps its feed-forward networks
                start = by_block[start_index(run.first, run.last, run.start)]
                inside = [option for option in start if option.family == "modulation"]
                whole = Segment(run.first, run.last, run.start or "middle")
                filled += [put_in(whole, run, choice, vectors) for choice in choices_of(inside, by_flops)]
            edges += [_edge(stack, offset, s, c, by_flops) for s, c in filled if s.is_substitute]
        offset += stack.num_blocks
    return edges


def edges_of_plan(model: ModelInfo, plan: Layout, by_flops: bool) -> list[Edge]:
    """The substitutes of one plan; those without a measured error come last."""
    offsets = [sum(stack.num_blocks for stack in model.stacks[:i]) for i in range(len(model.stacks))]
    return [
        _edge(stack, offset, s, _cost([1.0 if s.error is None else s.error]), by_flops)
        for stack, offset in zip(model.stacks, offsets, strict=True)
        for s in plan[stack.name]
        if s.is_substitute
    ]


def _edge(stack: Stack, offset: int, segment: Segment, cost: float, by_flops: bool) -> Edge:
    sizes = stack.block_flops if by_flops and stack.block_flops else stack.block_params
    start = start_index(segment.first, segment.last, segment.start)
    saved = sum(sizes[segment.first : segment.last + 1]) - sizes[start]
    saved += segment.saved_speed if by_flops else segment.saved_params
    squares, vectors = adding([1.0 if segment.error is None else segment.error], [segment.vector])
    alone, vector = float(squares[0]), tuple(vectors[0].tolist())
    return Edge(offset + segment.first, offset + segment.last, saved, cost, stack.name, segment, alone, vector)


def one_width(
    model: ModelInfo,
    runs: Sequence[Candidate],
    options: Sequence[WidthOption],
    by_flops: bool,
    vectors: Vectors | None = None,
) -> tuple[list[Edge], list[Edge]]:
    """Blocks whose networks all have one width, and the runs that may still become one such block.

    Args:
        model: The teacher.
        runs: Allowed runs; those without a finite cost are left out.
        options: The narrower networks of every block.
        by_flops: See :func:`edges_of`.
        vectors: See there.

    Returns:
        An edge for each block, and the runs' counted from those: what they save and cost where all blocks are narrow.
    """
    inside: dict[tuple[str, int], list[WidthOption]] = {}
    for option in options:
        inside.setdefault((option.stack, option.block), []).append(option)
    base, edges, offset = [], [], 0
    for stack in model.stacks:
        for i in range(stack.num_blocks):
            base.append(
                _edge(stack, offset, *put_in(Segment(i, i), None, tuple(inside[stack.name, i]), vectors), by_flops)
            )
        for run in (run for run in runs if run.stack == stack.name and math.isfinite(run.cost)):
            start = tuple(inside[stack.name, start_index(run.first, run.last, run.start)])
            filled = put_in(Segment(run.first, run.last, run.start or "middle"), run, start, vectors)
            edges.append(_edge(stack, offset, *filled, by_flops))
        offset += stack.num_blocks
    return base, _counted_from(base, edges)


def _counted_from(base: Sequence[Edge], edges: Sequence[Edge]) -> list[Edge]:
    """Edges counted from a base of one edge a block.

    With B the sum of the base's vectors and d what an edge adds to it, |B + sum d|^2 = |B|^2 + sum 2 B d + |sum d|^2.
    The middle is added to the edge's own error, and what is left has the form that paths are judged by.
    """
    moves = padded([edge.vector for edge in (*base, *edges)])
    own = np.array([edge.alone for edge in (*base, *edges)]) - SHARE * (moves**2).sum(1)
    whole, counted = moves[: len(base)].sum(0), []
    for number, edge in enumerate(edges, len(base)):
        here = slice(edge.first, edge.last + 1)
        move = moves[number] - moves[here].sum(0)
        alone = own[number] - own[here].sum() + SHARE * (2 * move @ whole + move @ move)
        saved, cost = (sum(getattr(part, name) for part in base[here]) for name in ("saved", "cost"))
        change = {"saved": edge.saved - saved, "cost": edge.cost - cost, "alone": float(alone)}
        counted.append(replace(edge, **change, vector=tuple(move.tolist())))
    return counted


Choice = tuple[WidthOption, ...]
Vectors = Mapping[str, Any]  # of each run and smaller module, by its name


def put_in(
    segment: Segment, run: Candidate | None, choice: Choice, vectors: Vectors | None = None
) -> tuple[Segment, float]:
    """Put what was measured into a segment.

    Args:
        segment: A kept block, or a run.
        run: What is known of the run; None of a kept block.
        choice: The smaller modules.
        vectors: How each moves the velocity, by its name.

    Returns:
        The segment with its error, and the cost of its edge.
    """
    measured = [*([] if run is None else [(run.name, math.sqrt(run.cost))]), *((o.name, o.error) for o in choice)]
    moves = [np.ravel((vectors or {}).get(name, ())).tolist() for name, _ in measured]
    error, vector = together([error for _, error in measured], moves)
    timed = any(option.saved_time is not None for option in choice)
    filled = Segment(
        segment.first,
        segment.last,
        segment.start,
        width={path: dict(part) for option in choice for path, part in option.parts.items()},
        saved_params=sum(option.saved_params for option in choice),
        saved_flops=sum(option.saved_flops for option in choice),
        error=error if measured else None,
        vector=vector,
        saved_time=sum(option.saved_speed for option in choice) if timed else None,
    )
    return filled, _cost([error for _, error in measured])


def _cost(errors: Sequence[float]) -> float:
    return float(unbounded(np.square(errors)).sum())


def choices_of(options: Sequence[WidthOption], by_flops: bool) -> list[Choice]:
    """Undominated choices of at most one option a group, no two of which replace the same module.

    Savings and costs add, so groups are merged one after another and what is dominated on the way stays so. Only
    the text stream replaces modules that belong to other groups: it is taken, or they are.
    """
    rest = [option for option in options if option.family != "text"]
    choices = _merge((), rest, by_flops)
    for text in (option for option in options if option.family == "text"):
        choices += _merge((text,), [o for o in rest if not overlap(o.parts, text.parts)], by_flops)
    return _undominated(choices, by_flops)


def _merge(base: Choice, options: Sequence[WidthOption], by_flops: bool) -> list[Choice]:
    groups: dict[str, list[WidthOption]] = {}
    for option in options:
        groups.setdefault(option.slot, []).append(option)
    choices = [base]
    for members in groups.values():
        choices = _undominated([*choices, *((*choice, o) for choice in choices for o in members)], by_flops)
    return choices


def _undominated(choices: Sequence[Choice], by_flops: bool) -> list[Choice]:
    """Those that no other beats in both saving and cost, from the largest saving on."""

    def rank(choice: Choice) -> tuple[float, float]:
        return -sum(o.saved_speed if by_flops else o.saved_params for o in choice), sum(o.error**2 for o in choice)

    best, kept = math.inf, []
    for choice in sorted(choices, key=rank):
        if rank(choice)[1] < best:
            best = rank(choice)[1]
            kept.append(choice)
    return kept


def overlap(parts: Parts, others: Parts) -> bool:
    """Whether a module that one changes is, or lies in, a module that the other does."""
    pairs = ((f"{a}.", f"{b}.") for a in changed(parts) for b in changed(others))
    return any(a.startswith(b) or b.startswith(a) for a, b in pairs)
