"""What a plan costs: parameters and FLOPs exactly, bytes, its error about; before anything is built. No torch here.

Squared errors of options add up only where they move the velocity in unrelated directions. With the vectors of
:mod:`ppcl.analysis.products` a plan x costs x^T G x: off its diagonal G has the products of two options' vectors, on it
their squared errors as measured. Large errors add up to less: a velocity that has lost everything but its length is
sqrt(2) away from the teacher's, and no further. So squares are taken as e^2 = q^2 / (1 + q^2 / 2) of some q^2, and
these are what adds up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ppcl.student.plan import Prediction, Segment, start_index
from ppcl.teacher.model_info import ModelInfo

SHARE = 0.5  # of two options' products that counts where plans are looked for (docs/decisions.md)
FARTHEST = 2.0  # squared relative error of a velocity that is unrelated to the teacher's, and as long
Stacks = Mapping[str, Sequence[Segment]]
Numbers = NDArray[np.float64]


def unbounded(squares: Numbers) -> Numbers:
    """What adds up of squared errors; from half of ``FARTHEST`` on, which trained substitutes stay below, a line."""
    half = FARTHEST / 2
    near = np.minimum(squares, half)
    return near / (1 - near / FARTHEST) + 4 * (squares - near)


def bounded(sums: Numbers) -> Numbers:
    """The inverse of :func:`unbounded`."""
    near = np.minimum(sums, FARTHEST)
    return near / (1 + near / FARTHEST) + (sums - near) / 4


def adding(errors: Sequence[float], vectors: Sequence[Sequence[float]]) -> tuple[Numbers, Numbers]:
    """What of several options adds up.

    Returns:
        Squares (N,), and vectors (N, D): all together are the squares of their sum, with these squares in place of each
        one's own.
    """
    squares = np.square(np.asarray(errors, dtype=float))
    free = unbounded(squares)
    return free, padded(vectors) * np.sqrt(free / np.maximum(squares, 1e-300))[:, None]


def together(errors: Sequence[float], vectors: Sequence[Sequence[float]]) -> tuple[float, tuple[float, ...]]:
    """The error and the vector of all options together; one with an empty vector is related to no other."""
    squares, rows = adding(errors, vectors)
    total = rows.sum(0)
    free = max(0.0, float(squares.sum() + total @ total - (rows**2).sum()))
    square = float(bounded(np.array(free)))
    return math.sqrt(square), tuple((total * math.sqrt(square / free) if free else total).tolist())


def padded(vectors: Sequence[Sequence[float]]) -> Numbers:
    """Vectors as rows of equal length, (N, D)."""
    rows = np.zeros((len(vectors), max(map(len, vectors), default=0)))
    for row, vector in zip(rows, vectors, strict=True):
        row[: len(vector)] = vector
    return rows


def with_short_vectors(stacks: Stacks) -> dict[str, tuple[Segment, ...]]:
    """A plan's segments with as few numbers in their vectors as tell all products of two: one more in each, at most."""
    known = [segment.vector for segment in _substitutes(stacks) if segment.vector]
    corner = np.asarray(np.linalg.qr(padded(known).T, mode="r")).T  # (N, N at most), lower triangle
    short = iter(tuple(float(f"{number:.7g}") for number in row[: at + 1]) for at, row in enumerate(corner))
    return {
        name: tuple(replace(s, vector=next(short)) if s.is_substitute and s.vector else s for s in segments)
        for name, segments in stacks.items()
    }


def _substitutes(stacks: Stacks) -> Iterable[Segment]:
    return (s for segments in stacks.values() for s in segments if s.is_substitute and not s.is_sparse_only)


def _error_of(stacks: Stacks) -> float | None:
    """The error of all substitutes together; None if one's is not known."""
    substitutes = list(_substitutes(stacks))
    errors = [segment.error for segment in substitutes if segment.error is not None]
    return together(errors, [s.vector for s in substitutes])[0] if len(errors) == len(substitutes) else None


def predict(model: ModelInfo, stacks: Stacks, error: float | None = None) -> Prediction:
    """Predict size, speed and error of a plan.

    A substitute block has the parameters and FLOPs of the block it starts from, less what its width saves; of smaller
    modules the time counts that was measured, since they seldom save as much as their FLOPs.

    Args:
        model: The teacher.
        stacks: Segments of each stack.
        error: Of the velocity, where it is known better than from the single substitutes'.
    """
    params, flops = model.params, model.flops
    for stack in model.stacks:
        for segment in stacks[stack.name]:
            start = start_index(segment.first, segment.last, segment.start)
            gone = [i for i in range(segment.first, segment.last + 1) if i != start]
            params -= sum(stack.block_params[i] for i in gone) + segment.saved_params
            if stack.block_flops:
                flops -= sum(stack.block_flops[i] for i in gone) + segment.saved_speed
    return Prediction(
        params=params,
        param_ratio=params / model.params,
        speedup=model.flops / flops if flops else 1.0,
        bytes=(model.stored.of(stacks) if model.stored else params * model.bytes_per_param) + model.other_bytes,
        error=_error_of(stacks) if error is None else error,
    )
