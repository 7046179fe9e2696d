"""Plans that know how errors add up: what is in them is exchanged while that lowers the error of all of it together.

The error of :func:`ppcl.student.prediction.together` is no sum over the edges of a path. Of products a share
counts here, for whoever looks for the least estimate finds what its noise flatters. The cheapest paths by each
edge's own squared error (:mod:`ppcl.pruning.knapsack`) are where this starts. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppcl.pruning.knapsack import Edge, Route
from ppcl.student.prediction import SHARE, Numbers, padded

AT_ONCE = 4_000_000  # pairs of moves that are looked at together
MOST = 500  # exchanges; each lowers the error, and a few dozen are usual
LEAST = 1e-9  # of a squared error, that an exchange must bring


class _Moves(NamedTuple):
    """Changes of a path, one a row: an edge comes in and those that overlap it go out, or one goes out.

    Attributes:
        edge: What comes in, -1 if nothing.
        low: First block that it touches.
        high: Last one.
        saved: What more is saved.
        own: What is added to the costs that do not depend on other edges.
        vector: What is added to the sum of vectors, (moves, numbers).
    """

    edge: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    saved: Numbers
    own: Numbers
    vector: Numbers


class JointErrors:
    """What adds up of squared errors (:func:`ppcl.student.prediction.unbounded`), of paths over edges.

    Args:
        edges: What may stand in the place of blocks.
    """

    def __init__(self, edges: Sequence[Edge]) -> None:
        self.first = np.array([edge.first for edge in edges])
        self.last = np.array([edge.last for edge in edges])
        self.saved = np.array([edge.saved for edge in edges], dtype=float)
        self.vectors = SHARE**0.5 * padded([edge.vector for edge in edges])
        self.own = np.array([edge.alone for edge in edges]) - (self.vectors**2).sum(1)

    def of(self, route: Route) -> float:
        """That of a path."""
        numbers = list(route)
        together = self.vectors[numbers].sum(0)
        return float(self.own[numbers].sum() + together @ together)

    def improved(self, route: Route, wanted: float) -> Route:
        """Exchange one or two edges at a time for what lowers the error most, until nothing does.

        Args:
            route: A path.
            wanted: What it saves at least, before and after.
        """
        for _ in range(MOST):
            better = self._exchanged(route, wanted)
            if better is None:
                break
            route = better
        return route

    def _exchanged(self, route: Route, wanted: float) -> Route | None:
        """The best path that one or two moves away saves enough; None if none has a smaller error."""
        moves = self._moves(route)
        numbers = list(route)
        together, slack = self.vectors[numbers].sum(0), wanted - self.saved[numbers].sum()
        gains = moves.own + 2 * moves.vector @ together + (moves.vector**2).sum(1)
        enough = moves.saved >= slack
        best = -LEAST
        chosen: tuple[int, ...] = ()
        if enough.any():
            one = int(np.where(enough, gains, np.inf).argmin())
            if gains[one] < best:
                best, chosen = float(gains[one]), (one,)
        rows = max(1, AT_ONCE // max(1, len(gains)))
        for start in range(0, len(gains), rows):
            part = slice(start, start + rows)
            both = gains[part, None] + gains + 2 * moves.vector[part] @ moves.vector.T
            apart = (moves.high[part, None] < moves.low) & (moves.saved[part, None] + moves.saved >= slack)
            both = np.where(apart, both, np.inf)
            if both.size and both.min() < best:
                best = float(both.min())
                row, column = divmod(int(both.argmin()), both.shape[1])
                chosen = (start + row, column)
        return self._apply(route, moves, chosen) if chosen else None

    def _moves(self, route: Route) -> _Moves:
        numbers = np.array(route, dtype=int)
        present = np.zeros(len(self.own), dtype=bool)
        present[numbers] = True
        coming = np.flatnonzero(~present)
        firsts, lasts = self.first[numbers], self.last[numbers]
        # rows: edges that come in, then one for each that goes out alone; columns: edges of the path
        overlap = (firsts[None] <= self.last[coming, None]) & (lasts[None] >= self.first[coming, None])
        gone = np.concatenate([overlap, np.eye(len(numbers), dtype=bool)])
        edge = np.concatenate([coming, np.full(len(numbers), -1)])
        comes = (edge >= 0)[:, None]
        low = np.where(gone, firsts[None], np.iinfo(int).max).min(1, initial=np.iinfo(int).max)
        high = np.where(gone, lasts[None], -1).max(1, initial=-1)
        low = np.where(edge >= 0, np.minimum(low, self.first[edge]), low)
        high = np.where(edge >= 0, np.maximum(high, self.last[edge]), high)
        out = gone.astype(float)
        return _Moves(
            edge,
            low,
            high,
            np.where(comes[:, 0], self.saved[edge], 0) - out @ self.saved[numbers],
            np.where(comes[:, 0], self.own[edge], 0) - out @ self.own[numbers],
            np.where(comes, self.vectors[edge], 0) - out @ self.vectors[numbers],
        )

    def _apply(self, route: Route, moves: _Moves, chosen: Sequence[int]) -> Route:
        kept = list(route)
        for move in chosen:
            low, high = moves.low[move], moves.high[move]
            edge = int(moves.edge[move])
            if edge < 0:
                kept = [number for number in kept if (self.first[number], self.last[number]) != (low, high)]
            else:
                first, last = self.first[edge], self.last[edge]
                kept = [n for n in kept if self.last[n] < first or self.first[n] > last]
                kept.append(edge)
        return tuple(sorted(kept, key=lambda number: int(self.first[number])))
