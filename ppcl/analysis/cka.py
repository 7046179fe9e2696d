"""Linear CKA with the debiased estimator of HSIC (Song et al. 2012, eq. 5), in feature form.

For K = X X^T and L = Y Y^T with zeroed diagonals,
HSIC = [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)),
CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). No n x n matrix is formed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _hsic(x: Tensor, y: Tensor) -> float:
    """HSIC of centred rows: the product in their own precision, the sums in float64."""
    n = len(x)
    # diagonals of K and L; rows are centred, so a row of K sums to zero and without its diagonal to minus that
    kx, ly = x.pow(2).sum(1, dtype=torch.float64), y.pow(2).sum(1, dtype=torch.float64)
    diagonals = kx @ ly
    trace = (x.T @ y).pow(2).sum(dtype=torch.float64) - diagonals
    total = kx.sum() * ly.sum() / ((n - 1) * (n - 2))
    return float((trace + total - 2 / (n - 2) * diagonals) / (n * (n - 3)))


def _centred(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.double()
    return (x - x.mean(0)).to(dtype)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of two sets of n aligned rows.

    Args:
        x: (n, d) features, n >= 4.
        y: (n, e) features.

    Returns:
        A number that is 1 for x = y and about 0 for independent rows (it can be slightly negative).
    """
    if len(x) < 4 or len(x) != len(y):
        raise ValueError(f"CKA needs at least 4 aligned rows, got {len(x)} and {len(y)}")
    x, y = _centred(x, torch.float64), _centred(y, torch.float64)
    norm = _hsic(x, x) * _hsic(y, y)
    return _hsic(x, y) / math.sqrt(max(norm, 1e-300))


def chained_cka(states: Tensor, probes: list[tuple[Tensor, Tensor]]) -> list[list[float | None]]:
    """CKA between true states and chained probes, for every pair of blocks (eq. 3).

    The M (M + 1) / 2 products are made in the precision of the states: float32 leaves errors of about 1e-6, far below
    what the sample of tokens leaves, at half the time.

    Args:
        states: (M + 1, n, d); row 0 enters the first block, row k + 1 leaves block k.
        probes: M residual maps (W, b): h + h W + b imitates the block.

    Returns:
        M x M table; entry [u][k] for k >= u, None elsewhere.
    """
    num_blocks, dtype = len(probes), states.dtype
    centred = [_centred(s, dtype) for s in states]
    own = [_hsic(s, s) for s in centred]
    maps = [(weight.to(dtype), bias.to(dtype)) for weight, bias in probes]
    table: list[list[float | None]] = [[None] * num_blocks for _ in range(num_blocks)]
    for u in range(num_blocks):
        chained = states[u]
        for k in range(u, num_blocks):
            weight, bias = maps[k]
            chained = chained + chained @ weight + bias
            y = _centred(chained, dtype)
            norm = math.sqrt(max(_hsic(y, y) * own[k + 1], 1e-300))
            table[u][k] = _hsic(y, centred[k + 1]) / norm
    return table


def combine(tables: dict[str, list[list[float | None]]], shares: dict[str, float]) -> list[list[float | None]]:
    """Average the streams' tables by their token share."""
    total = sum(shares.values())
    size = len(next(iter(tables.values())))
    combined: list[list[float | None]] = [[None] * size for _ in range(size)]
    for u in range(size):
        for k in range(u, size):
            combined[u][k] = sum(shares[s] * (table[u][k] or 0.0) for s, table in tables.items()) / total
    return combined


def sample_rows(num_tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw token positions of one state."""
    return torch.randperm(num_tokens, generator=generator)[:count]
