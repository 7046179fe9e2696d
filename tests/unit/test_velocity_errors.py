import pytest
import torch

from ppcl.eval.velocity import error_interval
from ppcl.teacher.velocity import VelocityErrors

TARGET = torch.tensor([[[3.0, 4.0]], [[0.0, 12.0]], [[1.0, 1.0]]])  # squares 25, 144, 2
OUTPUT = TARGET + torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 0.0]]])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_error_is_relative_over_all_states(size: int) -> None:
    errors = VelocityErrors()
    for target, output in zip(TARGET.split(size), OUTPUT.split(size), strict=True):
        errors.add(target, output.bfloat16())
    assert errors.by_state().tolist() == [[1, 4, 0], [25, 144, 2]]
    assert errors.squared == 5 / 171
    assert errors.relative == (5 / 171) ** 0.5
    assert error_interval(*errors.by_state().numpy()).value == pytest.approx(errors.relative)


def test_nothing_was_added() -> None:
    assert VelocityErrors().relative == 0
    assert VelocityErrors().by_state().shape == (2, 0)
