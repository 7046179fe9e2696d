"""What a plan costs: parameters and FLOPs exactly, bytes, its error about; before anything is built. No torch here.

Squared errors of options add up only where they move the velocity in unrelated directions. With the vectors of
:mod:`ppcl.analysis.prices` a plan x costs x^T G x: off its diagonal G has the products of two options' vectors, on it
their squared errors as measured, which a vector's own norm underrates where they are not small. Of the products half
counts (docs/decisions.md): whoever looks for the least estimate finds what its noise flatters, and large errors add up
to less than their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ppcl.student.plan import Prediction, Segment, start_index
from ppcl.teacher.model_info import ModelInfo

SHARE = 0.5  # of the products of two options' vectors that counts
Stacks = Mapping[str, Sequence[Segment]]


def joint_error(errors: Sequence[float], vectors: Sequence[Sequence[float]]) -> float:
    """The error of all options together, from each one's error and vector; an empty vector is related to no other."""
    rows = padded(vectors)
    products = float((rows.sum(0) ** 2).sum() - (rows**2).sum())
    return math.sqrt(max(0.0, sum(error * error for error in errors) + SHARE * products))


def padded(vectors: Sequence[Sequence[float]]) -> NDArray[np.float64]:
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
    return joint_error(errors, [s.vector for s in substitutes]) if len(errors) == len(substitutes) else None


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
