"""Linear CKA with the debiased estimator of HSIC (Song et al. 2012, eq. 5), in feature form.

For K = X X^T and L = Y Y^T with zeroed diagonals,
HSIC = [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)),
CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). No n x n matrix is formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppcl.training.distributed import SINGLE, Group

GROUPS = 8  # of held-out prompts, of which a draw takes half
DRAWS = 20


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Centre and scale rows, and put beside each its squared norm and a one: (n, d + 2).

    The product of two such matrices holds all sums of the estimator; sums over groups of rows add up.
    """
    made = torch.empty(len(x), x.shape[1] + 2, dtype=dtype, device=x.device)
    torch.sub(x, x.mean(0, dtype=torch.float64).to(dtype), out=made[:, :-2])
    norms = torch.linalg.vector_norm(made[:, :-2], dim=1)
    scale = norms.double().pow(2).mean().sqrt().clamp_min(torch.finfo(dtype).tiny).to(dtype)
    made[:, :-2] /= scale  # CKA does not see scale
    made[:, -2], made[:, -1] = (norms / scale).pow(2), 1
    return made


def _products(x: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """X^T Y of each group of rows, (groups, d + 2, e + 2)."""
    ends = list(itertools.accumulate(sizes))
    return torch.stack([x[end - size : end].T @ y[end - size : end] for end, size in zip(ends, sizes, strict=True)])


def _hsic(sums: Tensor) -> Tensor:
    """HSIC from products of :func:`_prepared` rows, (draws, d + 2, e + 2) to (draws,), in float64.

    K and L have their diagonals a_i = |x_i|^2 and b_i = |y_i|^2 taken out. The estimator does not change when rows
    are shifted, so the rows of a draw need not be centred anew.
    """
    cross, right, below = sums[:, :-2, :-2], sums[:, :, -2:].double(), sums[:, -2:, :-2].double()
    by_b, sum_x, by_a, sum_y = right[:, :-2, 0], right[:, :-2, 1], below[:, 0], below[:, 1]
    both, sum_a, sum_b, n = right[:, -2, 0], right[:, -2, 1], right[:, -1, 0], right[:, -1, 1]
    trace = cross.pow(2).sum((1, 2), dtype=torch.float64) - both
    total = (sum_x.pow(2).sum(1) - sum_a) * (sum_y.pow(2).sum(1) - sum_b)
    turned = (cross @ sum_y.to(cross.dtype)[:, :, None])[:, :, 0].double()
    chained = (sum_x * turned).sum(1) + both
    chained = chained - (sum_x * by_b).sum(1) - (sum_y * by_a).sum(1)
    return (trace + total / ((n - 1) * (n - 2)) - 2 / (n - 2) * chained) / (n * (n - 3))


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
    x, y = _prepared(x.double(), torch.float64), _prepared(y.double(), torch.float64)
    found = [_hsic(_products(a, b, [len(x)])) for a, b in ((x, y), (x, x), (y, y))]
    return float(found[0] / (found[1] * found[2]).clamp_min(1e-300).sqrt())


Table = list[list[float | None]]


def chained_cka(states: Sequence[Tensor] | Tensor, probes: Sequence[tuple[Tensor, Tensor]]) -> Table:
    """CKA between true states and chained probes, for every pair of blocks (eq. 3), over all rows.

    Args:
        states: See :func:`chained_ckas`.
        probes: M residual maps (W, b): h + h W + b imitates the block.

    Returns:
        M x M table; entry [u][k] for k >= u, None elsewhere.
    """
    return chained_ckas(states, probes, [len(states[0])], torch.ones(1, 1))[0]


def chained_ckas(
    states: Sequence[Tensor] | Tensor,
    probes: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    draws: Tensor,
    group: Group = SINGLE,
) -> list[Table]:
    """:func:`chained_cka` over several draws of the rows at once: sums are made once, by groups of rows.

    The M (M + 1) / 2 products are made in the precision of the states: float32 leaves errors of about 1e-6, far below
    what the choice of tokens leaves, at half the time. On the probes' device are one level, one chain and the sums.

    Args:
        states: M + 1 levels (n, d); the first enters the first block, level k + 1 leaves block k.
        probes: M residual maps (W, b): h + h W + b imitates the block.
        sizes: Rows of each group, in order; n together.
        draws: (draws, groups), 1 where a group belongs to a draw, else 0.
        group: The processes that share the chains, which all of them have the states of.

    Returns:
        A table for each draw.
    """
    rows = group.spread(dict.fromkeys(range(len(probes))), lambda own: _rows(states, probes, sizes, draws, list(own)))
    return [[rows[u][number] for u in range(len(probes))] for number in range(len(draws))]


def _rows(
    states: Sequence[Tensor] | Tensor,
    probes: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    draws: Tensor,
    first: Sequence[int],
) -> dict[int, list[list[float | None]]]:
    """For each of some first blocks, its row in the table of each draw."""
    num_blocks, dtype, device = len(probes), states[0].dtype, probes[0][0].device
    draws = draws.to(device, dtype)

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        products = _products(x, y, sizes)
        return _hsic((draws @ products.flatten(1)).reshape(-1, *products.shape[1:]))

    # CKA does not see shifts: of centred rows and without biases a chain is one product a block
    chains: dict[int, Tensor] = {}
    rows: dict[int, list[list[float | None]]] = {u: [[None] * num_blocks for _ in draws] for u in first}
    for k, (weight, _) in enumerate(probes):
        chain = (torch.eye(len(weight), dtype=weight.dtype, device=device) + weight).to(dtype)
        target = _prepared(states[k + 1].to(device), dtype)
        own = hsic(target, target)
        if k in rows:
            chains[k] = states[k] - states[k].mean(0, dtype=torch.float64).to(dtype)
        for u in chains:
            h = chains[u].to(device) @ chain
            chains[u] = h.to(states[0].device)
            y = _prepared(h, dtype)
            found = (hsic(y, target) / (hsic(y, y) * own).clamp_min(1e-300).sqrt()).tolist()
            for row, value in zip(rows[u], found, strict=True):
                row[k] = value
    return rows


def drawn_ckas(
    tokens: Mapping[str, tuple[Sequence[Tensor], Sequence[int]]],
    probes: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    generator: torch.Generator,
    group: Group = SINGLE,
) -> tuple[dict[str, Table], list[dict[str, Table]]]:
    """CKA of all tokens by stream, and of draws of half of the groups of prompts.

    Against all prompts a half varies as much as all of them would from one experiment to the next.

    Args:
        tokens: For each stream its levels, and the rows of each of ``GROUPS`` groups, see :func:`chained_ckas`.
        probes: For each stream.
        generator: For the draws.
        group: The processes that share the chains.

    Returns:
        The tables of all; and those of each draw, none where a draw would have fewer than four tokens of a stream.
    """
    halves = torch.stack([torch.randperm(GROUPS, generator=generator) for _ in range(DRAWS)]) < GROUPS // 2
    fewest = min(int((halves * torch.tensor(sizes)).sum(1).min()) for _, sizes in tokens.values())
    draws = torch.cat([torch.ones(1, GROUPS), halves.float()] if fewest >= 4 else [torch.ones(1, GROUPS)])
    tables = {
        stream: chained_ckas(states, probes[stream], sizes, draws, group) for stream, (states, sizes) in tokens.items()
    }
    whole, *drawn = [{stream: found[number] for stream, found in tables.items()} for number in range(len(draws))]
    return whole, drawn


def combine(tables: dict[str, Table], shares: dict[str, float]) -> Table:
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
