"""Debiased CKA against its n x n definition."""

from __future__ import annotations

import pytest
import torch
from tiny_models import noise
from torch import Tensor

from ppcl.analysis.cka import chained_cka, combine, linear_cka, sample_rows


def naive_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, eq. 5, with the matrices written out."""
    n = len(x)
    k, l = x.double() @ x.double().T, y.double() @ y.double().T  # noqa: E741 - the paper's letters
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    one = torch.ones(n, dtype=torch.float64)
    first = (k @ l).trace()
    second = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ k @ l @ one)
    return float((first + second - third) / (n * (n - 3)))


def naive_cka(x: Tensor, y: Tensor) -> float:
    return naive_hsic(x, y) / (naive_hsic(x, x) * naive_hsic(y, y)) ** 0.5


def biased_cka(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize(("n", "d", "e"), [(4, 3, 2), (20, 7, 7), (15, 40, 9)])
def test_equals_the_definition(n: int, d: int, e: int) -> None:
    x = noise(n, d, seed=1) + 5
    y = x[:, : min(d, e)] @ noise(min(d, e), e, seed=2) + noise(n, e, seed=3)
    assert linear_cka(x, y) == pytest.approx(naive_cka(x, y), abs=1e-9)


def test_is_one_for_a_rotation_and_shift() -> None:
    x = noise(30, 8) * torch.arange(1, 9)
    rotation, _ = torch.linalg.qr(noise(8, 8, seed=1))
    assert linear_cka(x, 2.5 * x @ rotation + 100) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)


def test_is_zero_for_independent_rows_where_the_biased_one_is_not() -> None:
    x, y = noise(64, 512, seed=1), noise(64, 512, seed=2)
    assert biased_cka(x, y) > 0.8
    assert abs(linear_cka(x, y)) < 0.05


def test_is_symmetric_and_finite_for_constant_rows() -> None:
    x, y = noise(20, 5), noise(20, 6, seed=1)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)
    assert linear_cka(torch.full((20, 5), 0.1), y) == pytest.approx(0, abs=1.0)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (5, 6)])
def test_needs_four_aligned_rows(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"at least 4 aligned rows, got {n} and {m}"):
        linear_cka(noise(n, 2), noise(m, 2))


def test_chained_table_by_hand() -> None:
    states = noise(4, 25, 6, seed=4).double().cumsum(0)
    probes = [(0.2 * noise(6, 6, seed=i).double(), noise(6, seed=10 + i).double()) for i in range(3)]
    table = chained_cka(states, probes)
    for u in range(3):
        for k in range(3):
            if k < u:
                assert table[u][k] is None
                continue
            h = states[u].double()
            for weight, bias in probes[u : k + 1]:
                h = h + h @ weight + bias
            assert table[u][k] == pytest.approx(naive_cka(h, states[k + 1]), abs=1e-9)


def test_chained_in_single_precision_is_close() -> None:
    states = noise(4, 25, 6, seed=4).cumsum(0) + 3
    probes = [(0.2 * noise(6, 6, seed=i).double(), noise(6, seed=10 + i).double()) for i in range(3)]
    exact = chained_cka(states.double(), probes)
    single = chained_cka(states, probes)
    assert all(single[u][k] == pytest.approx(exact[u][k], abs=1e-5) for u in range(3) for k in range(u, 3))


def test_chained_is_one_where_blocks_are_linear() -> None:
    probes = [(0.2 * noise(6, 6, seed=i).double(), noise(6, seed=10 + i).double()) for i in range(3)]
    states = [noise(25, 6).double()]
    for weight, bias in probes:
        states.append(states[-1] + states[-1] @ weight + bias)
    table = chained_cka(torch.stack(states), probes)
    assert all(table[u][k] == pytest.approx(1, abs=1e-12) for u in range(3) for k in range(u, 3))


def test_combine_weighs_streams_by_tokens() -> None:
    tables = {"image": [[1.0, 0.8], [None, 0.6]], "text": [[0.0, 0.4], [None, 0.2]]}
    combined = combine(tables, {"image": 30.0, "text": 10.0})
    assert combined[0] == pytest.approx([0.75, 0.7])
    assert combined[1][0] is None
    assert combined[1][1] == pytest.approx(0.5)


def test_sampled_rows_are_distinct_and_repeatable() -> None:
    first = sample_rows(10, 4, torch.Generator().manual_seed(3))
    assert torch.equal(first, sample_rows(10, 4, torch.Generator().manual_seed(3)))
    assert len(set(first.tolist())) == 4
    assert sorted(sample_rows(3, 8, torch.Generator().manual_seed(3)).tolist()) == [0, 1, 2]
