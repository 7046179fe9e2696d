"""Streaming normal equations against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import noise
from torch import Tensor

from ppcl.analysis.moments import Moments, best_ridge

D, E, N = 6, 4, 50


def rows(seed: int = 0, count: int = N, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    x = noise(count, D, seed=seed).double() @ noise(D, D, seed=99).double() + 3
    weight = noise(D, E, seed=98).double()
    return x, x @ weight - 2 + spread * noise(count, E, seed=seed + 1).double()


def moments(x: Tensor, y: Tensor, batch: int) -> Moments:
    result = Moments(x.shape[1], y.shape[1], torch.device("cpu"))
    for start in range(0, len(x), batch):
        result.update(x[start : start + batch], y[start : start + batch])
    return result


@pytest.mark.parametrize("batch", [1, 7, N])
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0])
def test_ridge_is_the_closed_form(batch: int, strength: float) -> None:
    x, y = rows()
    weight, bias = moments(x, y, batch).ridge(strength)
    a, b = x.numpy(), y.numpy()
    centred = a - a.mean(0)
    gram = centred.T @ centred
    expected = np.linalg.solve(gram + strength * np.trace(gram) / D * np.eye(D), centred.T @ (b - b.mean(0)))
    assert np.abs(weight.numpy() - expected).max() < 1e-8
    assert np.abs(bias.numpy() - (b.mean(0) - a.mean(0) @ expected)).max() < 1e-8


def test_no_ridge_is_least_squares() -> None:
    x, y = rows()
    weight, bias = moments(x, y, 9).ridge(0.0)
    expected = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((N, 1))]), y.numpy(), rcond=None)[0]
    assert np.abs(weight.numpy() - expected[:-1]).max() < 1e-8
    assert np.abs(bias.numpy() - expected[-1]).max() < 1e-8


@pytest.mark.parametrize("batch", [1, 7, N])
def test_errors_are_those_of_the_rows(batch: int) -> None:
    x, y = rows()
    sums = moments(x, y, batch)
    weight, bias = noise(D, E, seed=3).double(), noise(E, seed=4).double()
    direct = (x @ weight + bias - y).pow(2).sum().item()
    assert sums.squared_error(weight, bias) == pytest.approx(direct, rel=1e-10)
    assert sums.variance() == pytest.approx((y - y.mean(0)).pow(2).sum().item(), rel=1e-10)
    assert sums.count == N


def test_error_of_a_perfect_fit_is_not_negative() -> None:
    x, y = rows(spread=0.0)
    sums = moments(x, y, 8)
    error = sums.squared_error(*sums.ridge(0.0))
    assert 0 <= error < 1e-8 * sums.variance()


def test_half_precision_rows_are_summed_in_float64() -> None:
    x = torch.full((4096, 1), 1.001).bfloat16()
    sums = moments(x, x, 512)
    assert float(sums.sum_x) == pytest.approx(4096 * float(x[0]), rel=1e-12)


def test_constant_and_repeated_features_give_finite_maps() -> None:
    x, y = rows()
    x = torch.cat([x, x[:, :1], torch.ones(N, 1).double()], 1)
    weight, bias = moments(x, y, 10).ridge(0.0)
    assert torch.isfinite(weight).all()
    plain = moments(x[:, :D], y, 10)
    least = plain.squared_error(*plain.ridge(0.0))
    assert moments(x, y, 10).squared_error(weight, bias) == pytest.approx(least, rel=1e-6)


def test_best_ridge_avoids_overfitting() -> None:
    """Fewer rows than needed: the smallest ridge fits noise, the largest fits nothing."""
    fit_x, fit_y = rows(10, count=D + 2, spread=4.0)
    held_x, held_y = rows(20, count=200, spread=4.0)
    strengths = (1e-9, 1e-3, 1e-2, 1e-1, 1.0, 1e6)
    fit = moments(fit_x, fit_y, 3)
    direct = []
    for strength in strengths:
        weight, bias = fit.ridge(strength)
        direct.append(float((held_x @ weight + bias - held_y).pow(2).sum()))
    weight, bias, strength, error = best_ridge(fit, moments(held_x, held_y, 30), strengths)
    assert strength == strengths[int(np.argmin(direct))]
    assert strength not in (strengths[0], strengths[-1])
    spread = float((held_y - held_y.mean(0)).pow(2).sum())
    assert error == pytest.approx((min(direct) / spread) ** 0.5, rel=1e-8)
    assert torch.equal(weight, fit.ridge(strength)[0])
    assert torch.equal(bias, fit.ridge(strength)[1])


def test_a_part_of_many_outputs_chooses_the_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, held_out = moments(*rows(10, count=D + 2, spread=4.0), 3), moments(*rows(20, count=200, spread=4.0), 30)
    strengths = (1e-9, 1e-1, 1e6)
    every = best_ridge(fit, held_out, strengths)
    tried: list[tuple[int, ...]] = []
    whole = Moments.ridge

    def noted(self: Moments, strength: float) -> tuple[Tensor, Tensor]:
        tried.append(tuple(self.xy.shape))
        return whole(self, strength)

    monkeypatch.setattr("ppcl.analysis.moments.CHOOSING", 3)
    monkeypatch.setattr(Moments, "ridge", noted)
    part = best_ridge(fit, held_out, strengths)
    assert [outputs for _, outputs in tried] == [3] * len(strengths) + [len(fit.sum_y)]
    assert part[2] == every[2]
    assert part[3] == pytest.approx(every[3], rel=1e-12)
    assert torch.equal(part[0], every[0])


def test_dependent_features_get_the_smallest_map() -> None:
    """Fewer rows than features and hardly any ridge, as with few small pictures of a wide model."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 20, generator=generator).double(), torch.randn(6, 4, generator=generator).double()
    few = Moments(20, 4, torch.device("cpu"))
    few.update(x, y)
    weight, bias = few.ridge(0.0)
    expected = torch.linalg.pinv(x - x.mean(0)) @ (y - y.mean(0))
    assert torch.allclose(weight, expected, atol=1e-8)
    assert torch.allclose(x @ weight + bias, y, atol=1e-8)


def test_best_ridge_takes_the_smallest_on_clean_data() -> None:
    fit, held_out = moments(*rows(1, spread=0.0), 10), moments(*rows(5, spread=0.0), 10)
    _, _, strength, error = best_ridge(fit, held_out, (1e-1, 1e-10, 1e-4))
    assert strength == 1e-10
    assert error < 1e-6


def test_residual_probe_of_a_linear_block_recovers_its_map() -> None:
    weight, bias = 0.1 * noise(D, D, seed=5).double(), noise(D, seed=6).double()
    x = rows()[0]
    after = x + x @ weight + bias
    found, offset = moments(x, after - x, 11).ridge(0.0)
    assert torch.allclose(found, weight, atol=1e-10)
    assert torch.allclose(offset, bias, atol=1e-9)
