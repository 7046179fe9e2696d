"""Masks of single weights, made from their scores.

Weights are compared inside an output row, as Wanda and GBLM-Pruner do, or inside groups of m neighbours of a row (n:m,
which sparse tensor cores run). Equal scores are told apart by position: what comes first stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppcl.errors import ModelError


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Drop the weights of least score of every output row.

    Args:
        scores: (o, i).
        sparsity: Share of a row that goes, 0 to 1; rounded to whole weights.

    Returns:
        (o, i), true where a weight stays.

    Raises:
        ModelError: Scores are NaN, or the sparsity is not a share.
    """
    if not 0 <= sparsity <= 1:
        raise ModelError(f"a sparsity of {sparsity:g} cannot be cut; expected a share from 0 to 1")
    return _keep_best(scores, scores.shape[-1] - round(sparsity * scores.shape[-1]))


def n_of_m_mask(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Keep the n best of every m neighbours of a row.

    Args:
        scores: (o, i).
        n: That stay.
        m: Weights of a group.

    Returns:
        (o, i), true where a weight stays.

    Raises:
        ModelError: Scores are NaN, the rows do not divide into groups, or n is not between 0 and m.
    """
    rows, features = scores.shape
    if m < 1 or not 0 <= n <= m or features % m:
        raise ModelError(
            f"rows of {features} weights do not divide into {n} of {m}; expected n <= m and m | {features}"
        )
    return _keep_best(scores.reshape(rows, features // m, m), n).reshape(rows, features)


def _keep_best(scores: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest of the last axis, the first of equals before the others."""
    if scores.isnan().any():
        raise ModelError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN; look at what they are made of"
        )
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)
