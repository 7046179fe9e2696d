"""BiP: its implicit term against a bi-level gradient by finite differences, and scores on a teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_criteria import setting
from tiny_models import noise, qwen_call
from torch import Tensor

from ppcl.pruning.criteria import CRITERIA
from ppcl.pruning.criteria.bip import upper_gradient


def least_squares() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """l(z) = 1/2 ||X z - y||^2 / n, its weights before pruning, and a mask between 0 and 1."""
    x, y = noise(40, 6, seed=1).double(), noise(40, seed=2).double()
    mask = torch.linspace(0.3, 1.0, 6, dtype=torch.float64)
    return lambda z: 0.5 * (x @ z - y).pow(2).mean(), noise(6, seed=3).double(), mask


def solve(loss: Callable[[Tensor], Tensor], mask: Tensor, start: Tensor, gamma: float) -> Tensor:
    """The lower level: argmin over theta of l(m theta) + gamma / 2 ||theta - start||^2, by Newton's one step."""
    whole = lambda theta: loss(mask * theta) + gamma / 2 * (theta - start).pow(2).sum()  # noqa: E731
    gradient = torch.autograd.functional.jacobian(whole, start)
    return start - torch.linalg.solve(torch.autograd.functional.hessian(whole, start), gradient)


def by_differences(loss: Callable[[Tensor], Tensor], mask: Tensor, start: Tensor, gamma: float) -> Tensor:
    """The gradient of l(m theta(m)), weights following the mask, by central differences."""
    found = []
    for index in range(len(mask)):
        step = torch.zeros_like(mask)
        step[index] = 1e-4
        up, down = (loss(m * solve(loss, m, start, gamma)) for m in (mask + step, mask - step))
        found.append((up - down) / 2e-4)
    return torch.stack(found)


@pytest.mark.parametrize("pretrained", [False, True], ids=["from zero", "from weights"])
def test_the_implicit_term_is_that_of_the_bi_level_gradient(pretrained: bool) -> None:
    loss, weights, mask = least_squares()
    start = weights if pretrained else torch.zeros_like(weights)
    missed, without = [], []
    for gamma in (1e2, 1e3, 1e4):
        theta = solve(loss, mask, start, gamma)
        g = torch.autograd.functional.jacobian(loss, mask * theta)
        true = by_differences(loss, mask, start, gamma)
        found = upper_gradient(theta, g, mask, 1 / gamma)
        missed.append(float((found - true).norm() / true.norm()))
        without.append(float((theta * g - true).norm() / true.norm()))
    assert missed[2] < 1e-3  # the Hessian, which the paper leaves out, vanishes beside gamma
    assert missed[0] > 5 * missed[1] > 25 * missed[2]
    if not pretrained:  # both parts are of one size, so that half is missing without the implicit one
        assert without[2] == pytest.approx(0.5, abs=0.01)


def test_a_squared_mask_gradient_is_not_it() -> None:
    """What the published code does instead: (theta g)^2 in the place of m g^2."""
    loss, _, mask = least_squares()
    gamma, zero = 1e3, torch.zeros(6, dtype=torch.float64)
    theta = solve(loss, mask, zero, gamma)
    g = torch.autograd.functional.jacobian(loss, mask * theta)
    true = by_differences(loss, mask, zero, gamma)
    assert float((theta * g - (theta * g).pow(2) / gamma - true).norm() / true.norm()) > 0.4


def test_a_linear_loss_has_it_exactly() -> None:
    slope, mask, start = noise(5).double(), torch.rand(5, dtype=torch.float64) + 0.1, noise(5, seed=4).double()
    true = by_differences(lambda z: (slope * z).sum(), mask, start, 2.0)
    theta = solve(lambda z: (slope * z).sum(), mask, start, 2.0)
    torch.testing.assert_close(upper_gradient(theta, slope, mask, 0.5), true, rtol=1e-6, atol=1e-8)


def test_units_that_do_nothing_are_worth_least() -> None:
    transformer, adapter, sites, call = setting(batch=2)
    module = sites[1].module(transformer, adapter)
    idle = list(range(0, 128, 8))
    with torch.no_grad():
        for index in range(128):
            module.net[2].weight[:, index] *= 0 if index in idle else 3
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    batches = [call, qwen_call(2, seed=9)]
    heads, neurons = CRITERIA["bip"].score(transformer, adapter, sites, batches, 0)
    assert heads.shape == (2,)
    assert (neurons >= 0).all()
    assert set(neurons.argsort()[: len(idle)].tolist()) == set(idle)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert all(p.grad is None for p in transformer.parameters())
    assert not transformer.is_gradient_checkpointing
    assert not any(module._forward_hooks for module in transformer.modules())


def test_data_move_the_scores_away_from_where_they_start() -> None:
    transformer, adapter, sites, call = setting(batch=2)
    weights = sites[1].module(transformer, adapter).net[2].weight.detach().norm(dim=0)
    start = weights / weights.mean()
    (score,) = CRITERIA["bip"].score(transformer, adapter, sites[1:], [call], 0)
    moved = score - (start - start.min())
    assert float(moved.std()) > 0.02
    (again,) = CRITERIA["bip"].score(transformer, adapter, sites[1:], [call], 1)
    assert torch.equal(score, again)  # nothing is drawn
