"""2:4 weights for sparse kernels: what is turned, and what is said where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppcl.errors import ModelError, UserError
from ppcl.pipelines import semi_structured, to_semi_structured


def model() -> nn.Module:
    """A 2:4 layer, a dense one, a 2:4 one of odd shape, and one with zeros elsewhere."""
    made = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4), "c": nn.Linear(4, 3), "d": nn.Linear(8, 4)})
    with torch.no_grad():
        made["a"].weight[:, [0, 3, 5, 6]] = 0
        made["c"].weight[:, 2:] = 0
        made["d"].weight[:, :4] = 0  # half of them zero, and no 2:4
    return made.bfloat16()


def test_where_there_are_no_kernels_one_line_says_so() -> None:
    with pytest.raises(UserError, match="need an NVIDIA GPU, the transformer is on cpu; the dense weights") as caught:
        to_semi_structured(model())
    assert "\n" not in str(caught.value)


def test_two_of_every_four_in_a_row() -> None:
    found = {name: semi_structured.is_two_of_four(layer.weight) for name, layer in model().items()}
    assert found == {"a": True, "b": False, "c": True, "d": False}


def test_layers_that_fit_are_turned_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def turn(weight: torch.Tensor) -> torch.Tensor:
        if len(weight) % 4:
            raise RuntimeError("shape is not supported!\nBoth must be multiples")
        return weight * 2  # told apart from the dense one

    monkeypatch.setattr(semi_structured, "_check_place", lambda weight: None)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", turn)
    made = model()
    before = {name: layer.weight.clone() for name, layer in made.items()}
    assert to_semi_structured(made) == ["a"]
    assert torch.equal(made["a"].weight, 2 * before["a"])
    assert all(torch.equal(made[name].weight, before[name]) for name in "bcd")
    assert "1 of 2 layers stay dense, e.g. c: shape is not supported! Both" in caplog.text
    with pytest.raises(ModelError, match=r"no linear layer .* sparsity\.pattern=2:4"):
        to_semi_structured(nn.ModuleDict({"b": made["b"]}))
    with pytest.raises(ModelError, match=r"takes none of the 2:4 layers, e\.g\. c: shape"):
        to_semi_structured(nn.ModuleDict({"c": made["c"]}))
