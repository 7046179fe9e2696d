"""How much do two options move the velocity alike? Vectors whose products say so, from what was seen with random signs.

With the same K random vectors r of a state, the products <r, a> and <r, b> of two displacements have <a, b> as the mean
of theirs. Its error is about |a| |b| / sqrt(K N) over N states, which is much where several large errors add up. Prices
cost a backward pass for each r, so these have few; what was carried to the velocity was multiplied with many
(:data:`ppcl.analysis.prices.CARRIED`), of which the first are those of the prices. Each product is taken from as many
as both have, and then all of them are told again by one vector an option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ppcl.analysis.prices import Price

LEAST = 1e-6  # share of the largest direction, below which one is noise


def common_vectors(prices: Mapping[str, Price]) -> dict[str, Tensor]:
    """Vectors of all options, whose products are those of their displacements.

    Args:
        prices: By name; vectors (K, N) with K as large as it is for each.

    Returns:
        Vectors (1, D) by name.
    """
    counts = sorted({len(price.vector) for price in prices.values()})
    names = sorted(prices, key=lambda name: len(prices[name].vector))
    alike = torch.zeros(len(names), len(names), dtype=torch.float64)
    for count in counts:  # from few signs to many, which overwrite what few have said
        first = next(n for n, name in enumerate(names) if len(prices[name].vector) >= count)
        rows = torch.stack([_cut(prices[name].vector, count) for name in names[first:]])
        alike[first:, first:] = rows @ rows.T
    lengths = alike.diagonal().clamp_min(1e-300).sqrt()
    values, directions = torch.linalg.eigh(alike / torch.outer(lengths, lengths))
    kept = values > LEAST * values[-1:]  # different estimates of products need not fit together exactly
    vectors = directions[:, kept] * values[kept].sqrt()
    vectors *= (lengths / vectors.norm(dim=1).clamp_min(1e-300))[:, None]
    return {name: vector[None] for name, vector in zip(names, vectors, strict=True)}


def _cut(vector: Tensor, count: int) -> Tensor:
    """The products with the first ``count`` random vectors, flat, in double precision."""
    return vector[:count].double().flatten() * math.sqrt(len(vector) / count)
