"""SGD for scores: their order follows from the size of their gradients, not from the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppcl.common.streams import Stream, step_generator
from ppcl.training.optimizers import ScaledSGD


def drifting(optimizer_of: Any, seed: int) -> Tensor:
    """Train 40 scores for 60 steps on gradients that differ by a tenth and are noisy by half."""
    scores = torch.zeros(40, requires_grad=True)
    optimizer = optimizer_of(scores)
    for step in range(60):
        scores.grad = torch.linspace(0.9, 1.1, 40) + 0.3 * torch.randn(
            40, generator=step_generator(seed, step, Stream.OUTPUT_SIGNS)
        )
        optimizer.step()
    return scores.detach()


def test_scores_are_ordered_by_their_gradients_size() -> None:
    def agreement(optimizer_of: Any) -> float:
        return float(torch.corrcoef(torch.stack([drifting(optimizer_of, seed) for seed in (0, 1)]))[0, 1])

    scaled = agreement(lambda scores: ScaledSGD([[scores]], [5.0], 60))
    adam = agreement(lambda scores: torch.optim.Adam([scores], 0.1))
    assert scaled > 0.6 > adam + 0.2


def test_scores_go_as_far_as_they_may() -> None:
    near, far = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = ScaledSGD([[near], [far]], [2.0, 7.0], 12)
    for step in range(12):
        near.grad, far.grad = torch.tensor([3.0, 4.0]), torch.tensor([1e-6 if step < 2 else 5.0])
        optimizer.step()
    assert float(near.pow(2).mean().sqrt()) == pytest.approx(2.0)
    assert float(near[0] / near[1]) == pytest.approx(0.75)  # Adam makes it 1
    assert float(far) == pytest.approx(1 - 7.0)  # what is larger than the first gradient is clipped
    still = torch.ones(1, requires_grad=True)
    idle = ScaledSGD([[still]], [1.0], 2)
    still.grad = torch.zeros(1)
    idle.step()
    assert still.item() == 1.0
    still.grad = torch.ones(1)
    idle.step()
    assert still.item() < 1.0
