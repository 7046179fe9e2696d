"""The layer graph and the search for paths in it, after Paths-over-Graph (arXiv 2410.14211). No torch here.

Nodes are the states between blocks, edges are what may stand between two of them: the teacher's own block, which is
free, or something smaller (a run's substitute, a block with smaller modules). A path from the first node to the last
one is a whole model; it is named by its smaller edges, in order. The knowledge graph of the paper becomes this graph,
its reasoning paths become models, and its three-step pruning is kept:

1. *fuzzy*: by an additive proxy, the sum of the edges' own squared errors, the best 80 paths are kept;
2. *branch-reduced*: paths share their first and last h edges; each such branch is measured once as a whole, a path is
   worth the sum of its branches and of what lies between them, and the best 20 are kept;
3. *precise*: the whole path is measured; the best 3 are kept.

So are its three phases of exploration: paths through the blocks that must be kept, paths of edges that something
suggests beforehand, and neighbours of the paths kept so far, which differ in one edge.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ppcl.student.plan import Segment

Route = tuple[int, ...]
Measure = Callable[[Sequence[Route]], Sequence[float]]
_CELLS = 64  # classes of savings that the proxy's search tells apart


@dataclass(frozen=True)
class Edge:
    """Something smaller in the place of blocks first..last.

    Attributes:
        first: First block, numbered through all stacks.
        last: Last block, inclusive.
        saved: What it saves, in the budget's unit.
        cost: Squared relative velocity error when it alone is put in.
        stack: Its stack.
        segment: What it is in a plan.
    """

    first: int
    last: int
    saved: float
    cost: float
    stack: str
    segment: Segment


@dataclass(frozen=True)
class Widths:
    """How many paths each step keeps, the edges of a branch, and how often neighbours are looked at."""

    fuzzy: int = 80
    reduced: int = 20
    precise: int = 3
    branch: int = 3
    rounds: int = 3


class _Ways(NamedTuple):
    """Ways to a node, one an entry: cost, savings, the way before it at its edge's first node, the edge (-1: none)."""

    cost: np.ndarray
    saved: np.ndarray
    before: np.ndarray
    edge: np.ndarray


_NONE = _Ways(*np.zeros((2, 0)), *np.zeros((2, 0), dtype=int))


class Graph:
    """Edges over a line of blocks.

    Args:
        num_blocks: Of all stacks together.
        edges: Those beside the teacher's own blocks; none crosses the border of two stacks.
        needed: What a path must save.
    """

    def __init__(self, num_blocks: int, edges: Sequence[Edge], needed: float) -> None:
        self.num_blocks, self.edges, self.needed = num_blocks, list(edges), needed

    def proxy(self, route: Iterable[int]) -> float:
        """The additive proxy: the sum of the edges' costs."""
        return sum(self.edges[number].cost for number in route)

    def saved(self, route: Iterable[int]) -> float:
        """What a path saves."""
        return sum(self.edges[number].saved for number in route)

    def saves_enough(self, route: Iterable[int]) -> bool:
        """Whether a path meets the budget."""
        return self.saved(route) >= self._enough

    def avoiding(self, blocks: Collection[int]) -> set[int]:
        """Edges that leave these blocks as they are."""
        kept = set(blocks)
        return {n for n, e in enumerate(self.edges) if not kept.intersection(range(e.first, e.last + 1))}

    def cheapest(self, count: int, allowed: Collection[int] | None = None, fixed: Route = ()) -> list[Route]:
        """Return the paths of least proxy that save enough, by dynamic programming over nodes and savings.

        Args:
            count: How many at most.
            allowed: Edges that may be used beside the teacher's; all if None.
            fixed: Edges that must be used; they do not overlap.

        Returns:
            Paths from the cheapest on. With many different savings the last of them are approximate: at a node, of
            paths that saved about the same only the cheapest ``count`` go on.
        """
        taken = {block for n in fixed for block in range(self.edges[n].first, self.edges[n].last + 1)}
        starts: list[list[int]] = [[] for _ in range(self.num_blocks)]
        for number, edge in enumerate(self.edges):
            usable = allowed is None or number in allowed
            if number in fixed or (usable and not taken.intersection(range(edge.first, edge.last + 1))):
                starts[edge.first].append(number)
        arriving: list[list[_Ways]] = [[] for _ in range(self.num_blocks + 1)]
        arriving[0].append(_Ways(*np.zeros((2, 1)), *np.full((2, 1), -1)))
        at: list[_Ways] = []
        for position in range(self.num_blocks + 1):
            ways = _Ways(*map(np.concatenate, zip(*arriving[position], strict=True))) if arriving[position] else _NONE
            arriving[position] = []
            at.append(self._best(ways, count))
            here = np.arange(len(at[-1].cost))
            if position < self.num_blocks and position not in taken:
                arriving[position + 1].append(_Ways(at[-1].cost, at[-1].saved, here, np.full(len(here), -1)))
            for number in starts[position] if position < self.num_blocks else ():
                edge = self.edges[number]
                ways = _Ways(at[-1].cost + edge.cost, at[-1].saved + edge.saved, here, np.full(len(here), number))
                arriving[edge.last + 1].append(ways)
        enough = np.flatnonzero(at[-1].saved >= self._enough)
        order = enough[np.lexsort((at[-1].saved[enough], at[-1].cost[enough]))][:count]
        return [self._route(at, int(index)) for index in order]

    @property
    def _enough(self) -> float:
        """What a path must save, but for rounding."""
        return self.needed - 1e-12 * abs(self.needed)

    def _best(self, ways: _Ways, count: int) -> _Ways:
        """Of the ways to a node the cheapest ``count`` of each class of savings.

        What saves enough is never in one class with what does not.
        """
        unit = max(self.needed, *(edge.saved for edge in self.edges), 1e-12) / _CELLS
        cells = np.floor((ways.saved - self._enough) / unit)
        order = np.lexsort((ways.cost, cells))
        first = np.flatnonzero(np.diff(cells[order], prepend=-np.inf))
        sizes = np.diff(np.append(first, len(order)))
        rank = np.arange(len(order)) - np.repeat(first, sizes)
        kept = order[rank < count]
        return _Ways(*(values[kept] for values in ways))

    def _route(self, at: Sequence[_Ways], index: int) -> Route:
        """Follow a way back to the first node."""
        found: list[int] = []
        position = len(at) - 1
        while position:
            number = int(at[position].edge[index])
            index = int(at[position].before[index])
            found += [number] if number >= 0 else []
            position = self.edges[number].first if number >= 0 else position - 1
        return tuple(reversed(found))

    def most(self) -> Route:
        """The path that saves most."""
        best: list[tuple[float, Route]] = [(0.0, ()), *((-1.0, ()) for _ in range(self.num_blocks))]
        by_start: dict[int, list[int]] = {}
        for number, edge in enumerate(self.edges):
            by_start.setdefault(edge.first, []).append(number)
        for position in range(self.num_blocks):
            saved, route = best[position]
            best[position + 1] = max(best[position + 1], (saved, route))
            for number in by_start.get(position, ()):
                edge = self.edges[number]
                best[edge.last + 1] = max(best[edge.last + 1], (saved + edge.saved, (*route, number)))
        return best[-1][1]

    def neighbours(self, route: Route, count: int) -> list[Route]:
        """Paths that keep all edges of a path but one; what that edge saved is found elsewhere."""
        found = {way for n in route for way in self.cheapest(count, fixed=tuple(m for m in route if m != n))}
        return heapq.nsmallest(count, found - {route}, key=lambda way: (self.proxy(way), way))


class PathSearch:
    """The three steps, over the three phases.

    Args:
        graph: The layer graph.
        branches: Measures branches: squared errors of their edges put in together, the teacher's blocks elsewhere.
        whole: Measures whole paths the same way, more exactly.
        widths: See :class:`Widths`.
    """

    def __init__(self, graph: Graph, branches: Measure, whole: Measure, widths: Widths | None = None) -> None:
        self.graph, self.widths = graph, widths or Widths()
        self._branches, self._whole = branches, whole
        self._known_branches: dict[Route, float] = {(): 0.0}
        self.known: dict[Route, float] = {}

    def run(self, must_keep: Collection[int] = (), priors: Sequence[Route] = ()) -> Route | None:
        """Search.

        Args:
            must_keep: Blocks that the first phase leaves alone, where the budget allows it.
            priors: Paths whose edges the second phase is made of; they need not save enough.

        Returns:
            The measured path of least error, or None if none saves enough.
        """
        graph, widths = self.graph, self.widths
        everything = graph.cheapest(widths.fuzzy + 1)
        if len(everything) <= widths.fuzzy:  # a graph that small is measured as a whole
            self._precise(everything)
            return min(self.known, key=self._order, default=None)
        self._three_steps(graph.cheapest(widths.fuzzy, graph.avoiding(must_keep)) or everything[: widths.fuzzy])
        suggested = {number for route in priors for number in route}
        enough = [route for route in priors if graph.saves_enough(route)]
        self._three_steps([*enough, *graph.cheapest(widths.fuzzy, suggested)])
        self._precise(enough)
        for _ in range(widths.rounds):
            kept = heapq.nsmallest(widths.precise, self.known, key=self._order)
            near = {way for route in kept for way in graph.neighbours(route, widths.fuzzy)}
            self._three_steps([*everything, *near])
            if heapq.nsmallest(widths.precise, self.known, key=self._order) == kept:
                break
        return min(self.known, key=self._order)

    def _order(self, route: Route) -> tuple[float, Route]:
        return self.known[route], route

    def _three_steps(self, routes: Iterable[Route]) -> None:
        """Measure the most promising of some paths."""
        new = [route for route in dict.fromkeys(routes) if route not in self.known]
        fuzzy = heapq.nsmallest(self.widths.fuzzy, new, key=lambda route: (self.graph.proxy(route), route))
        split = {route: self._split(route) for route in fuzzy}
        groups = {branch for head, _, tail in split.values() for branch in (head, tail)}
        unknown = sorted(branch for branch in groups if branch not in self._known_branches)
        self._known_branches |= dict(zip(unknown, self._branches(unknown), strict=True))

        def score(route: Route) -> tuple[float, Route]:
            head, middle, tail = split[route]
            ends = self._known_branches[head] + self._known_branches[tail]
            return ends + self.graph.proxy(middle), route

        self._precise(heapq.nsmallest(self.widths.reduced, fuzzy, key=score))

    def _precise(self, routes: Sequence[Route]) -> None:
        new = [route for route in dict.fromkeys(routes) if route not in self.known]
        self.known |= dict(zip(new, self._whole(new), strict=True))

    def _split(self, route: Route) -> tuple[Route, Route, Route]:
        """First h edges, what lies between, last h edges; short paths are halved."""
        h = min(self.widths.branch, (len(route) + 1) // 2)
        tail = max(h, len(route) - h)
        return route[:h], route[h:tail], route[tail:]
