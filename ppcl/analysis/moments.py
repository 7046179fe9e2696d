"""Streaming normal equations, summed in float64.

For rows x (1 x d) and y (1 x e) the sums n, sum x, sum y, X^T X, X^T Y and sum ||y||^2 are
all that is needed to fit y = x W + b by ridge regression and to know the error of any
(W, b) on the rows that made the sums. Memory does not depend on the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor

from ppcl.training.distributed import Group

K = TypeVar("K", bound=Hashable)
CHOOSING = 384  # outputs that choose a ridge


class Moments:
    """Sums over pairs of rows.

    Args:
        inputs: d, features of x.
        outputs: e, features of y.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.sum_x, self.sum_y = zeros(inputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)
        self.yy = 0.0
        self._spectrum: dict[str, Tensor] = {}  # of the centred Gram matrix, if it was needed

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (N, d) and y (N, e).

        The products of one batch are made in the rows' own precision (at least float32) and summed
        in float64: float64 products would cost more than the teacher's blocks themselves.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        self._spectrum = {}
        self.count += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2

    def ridge(self, strength: float) -> tuple[Tensor, Tensor]:
        """Fit y = x W + b.

        Args:
            strength: Ridge relative to the mean diagonal of the centred Gram matrix.

        Returns:
            W (d, e) and b (e), float64.
        """
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        gram = self.xx - self.count * torch.outer(mean_x, mean_x)
        cross = self.xy - self.count * torch.outer(mean_x, mean_y)
        scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        gram.diagonal().add_(strength * scale)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # not positive definite: dependent features and hardly any ridge
            if not self._spectrum:  # the same for all strengths, but for a shift
                gram.diagonal().sub_(strength * scale)
                self._spectrum.update(zip(("values", "vectors"), torch.linalg.eigh(gram), strict=True))
            values, vectors = self._spectrum["values"] + strength * scale, self._spectrum["vectors"]
            kept = values > len(gram) * torch.finfo(torch.float64).eps * values[-1]  # the smallest solution
            vectors = vectors[:, kept]
            weight = vectors @ ((vectors.T @ cross) / values[kept, None])
        else:
            weight = torch.cholesky_solve(cross, factor)
        return weight, mean_y - mean_x @ weight

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """Sum of ||x W + b - y||^2 over the rows."""
        return max(0.0, self._beyond(weight, bias) + self.yy)

    def _beyond(self, weight: Tensor, bias: Tensor) -> float:
        """The same less the sum of ||y||^2."""
        quadratic = (weight * (self.xx @ weight)).sum() - 2 * (weight * self.xy).sum()
        linear = 2 * bias @ (self.sum_x @ weight) - 2 * bias @ self.sum_y + self.count * bias @ bias
        return float(quadratic + linear)

    def best_of(self, strengths: Sequence[float], held_out: Moments, outputs: int) -> float:
        """The ridge strength of least held-out error over some outputs, spread evenly.

        Args:
            strengths: To choose from.
            held_out: Other rows.
            outputs: How many.
        """
        columns = torch.linspace(0, len(self.sum_y) - 1, outputs).round().long().to(self.xx.device)
        fit, other = self._part(columns), held_out._part(columns)
        return min(strengths, key=lambda strength: other._beyond(*fit.ridge(strength)))

    def _part(self, columns: Tensor) -> Moments:
        part = copy(self)
        part.sum_y, part.xy, part.yy = self.sum_y[columns], self.xy[:, columns], 0.0
        return part

    def is_finite(self) -> bool:
        """Whether all of what was added up is a number."""
        return math.isfinite(self.yy + sum(float(t.sum()) for t in (self.sum_x, self.sum_y, self.xx, self.xy)))

    def variance(self) -> float:
        """Sum of ||y - mean y||^2."""
        return max(1e-300, self.yy - float(self.sum_y.pow(2).sum()) / self.count)


def add_up(sums: Mapping[K, Moments], group: Group) -> dict[K, Moments]:
    """Add up the sums of several processes under each name; some may be of a part of the processes only."""
    if group.size == 1:
        return dict(sums)
    shapes = {name: (*m.xy.shape, m.xy.device.type) for name, m in sums.items()}  # each process has its own device
    known = {name: shape for found in group.gather(shapes) for name, shape in found.items()}
    total: dict[K, Moments] = {}
    for name, (inputs, outputs, device) in known.items():
        moments = sums.get(name) or Moments(inputs, outputs, torch.device(device))
        numbers = torch.tensor([moments.count, moments.yy], dtype=torch.float64, device=moments.xx.device)
        group.sum_tensors([numbers, moments.sum_x, moments.sum_y, moments.xx, moments.xy])
        moments.count, moments.yy = int(numbers[0]), float(numbers[1])
        total[name] = moments
    return total


def best_ridge(fit: Moments, held_out: Moments, strengths: tuple[float, ...]) -> tuple[Tensor, Tensor, float, float]:
    """Fit with each ridge strength and keep the one of least held-out error.

    Of more than ``CHOOSING`` outputs so many choose: a solve costs as much as there are outputs, which of some is best
    is known from a part of them.

    Returns:
        W, b, the strength, and the held-out relative error sqrt(residual / variance).
    """
    if len(strengths) > 1 and len(fit.sum_y) > CHOOSING:
        strengths = (fit.best_of(strengths, held_out, CHOOSING),)
    best: tuple[float, float, Tensor, Tensor] | None = None
    for strength in strengths:
        weight, bias = fit.ridge(strength)
        error = held_out.squared_error(weight, bias)
        if best is None or error < best[0]:
            best = (error, strength, weight, bias)
    if best is None:
        raise ValueError("at least one ridge strength is needed")
    error, strength, weight, bias = best
    return weight, bias, strength, (error / held_out.variance()) ** 0.5
