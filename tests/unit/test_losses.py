"""The losses by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import noise

from ppcl.training.losses import direction, normalized, state_loss, velocity_loss


def test_direction_is_eq_6() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0]])
    teacher = torch.tensor([[6.0, 8.0], [0.0, 5.0], [1.0, 0.0]])
    assert direction(student, teacher).tolist() == pytest.approx([0.0, 2.0, 4.0], abs=1e-6)
    s, t = noise(5, 7), noise(5, 7, seed=1)
    unit_s, unit_t = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    assert torch.allclose(direction(s, t), (unit_s - unit_t).norm(dim=1) ** 2, atol=1e-6)


def test_direction_ignores_scale_and_normalized_does_not() -> None:
    s, t = noise(5, 7), noise(5, 7, seed=1)
    assert torch.allclose(direction(3 * s, t), direction(s, t), atol=1e-6)
    assert torch.allclose(direction(s, 0.1 * t), direction(s, t), atol=1e-6)
    assert not torch.allclose(normalized(3 * s, t), normalized(s, t), atol=1e-2)
    assert torch.allclose(normalized(3 * s, 3 * t), normalized(s, t), atol=1e-5)


def test_normalized_is_direction_and_magnitude() -> None:
    s, t = 4 * noise(6, 9), noise(6, 9, seed=1)
    r = s.norm(dim=1) / t.norm(dim=1)
    assert torch.allclose(normalized(s, t), (r - 1) ** 2 + r * direction(s, t), rtol=1e-5)
    assert torch.allclose(normalized(s, t), (s - t).norm(dim=1) ** 2 / t.norm(dim=1) ** 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["normalized", "direction"])
def test_zero_states_give_finite_losses_and_gradients(kind: str) -> None:
    s = torch.zeros(1, 2, 3, requires_grad=True)
    loss = state_loss({"image": s}, {"image": torch.zeros(1, 2, 3)}, {}, kind)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("kind", ["normalized", "direction"])
def test_state_loss_averages_streams_and_skips_padding(kind: str) -> None:
    token = {"normalized": normalized, "direction": direction}[kind]
    student = {"image": noise(2, 4, 5), "text": noise(2, 3, 5, seed=1).requires_grad_()}
    teacher = {"image": noise(2, 4, 5, seed=2), "text": noise(2, 3, 5, seed=3)}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss = state_loss(student, teacher, {"text": mask}, kind)
    text = token(student["text"], teacher["text"])
    valid = torch.stack([text[0, 0], text[0, 1], text[0, 2], text[1, 0]]).mean()
    assert loss.item() == pytest.approx((token(student["image"], teacher["image"]).mean() + valid).item() / 2, rel=1e-6)
    loss.backward()
    assert (student["text"].grad[1, 1:] == 0).all()
    assert (student["text"].grad[1, 0] != 0).any()
    assert state_loss(student, teacher, {}, kind).item() != pytest.approx(loss.item(), rel=1e-3)


def test_teacher_gets_no_gradient() -> None:
    s, t = noise(1, 2, 3).requires_grad_(), noise(1, 2, 3, seed=1).requires_grad_()
    state_loss({"image": s}, {"image": t}, {}).backward()
    velocity_loss(s, t).backward()
    assert s.grad is not None
    assert t.grad is None


def test_velocity_loss_is_the_mean_relative_error_of_samples() -> None:
    s, t = noise(3, 4, 5), noise(3, 4, 5, seed=1)
    t[1] *= 100  # one loud sample must not drown the others
    by_hand = [((s[i] - t[i]).norm() / t[i].norm()).item() ** 2 for i in range(3)]
    assert velocity_loss(s, t).item() == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert velocity_loss(t, t).item() == 0
    assert velocity_loss(s.bfloat16(), t.bfloat16()).dtype == torch.float32
