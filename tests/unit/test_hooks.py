import pytest
import torch
from torch import nn

from ppcl.common.hooks import removing


def test_hooks_go_with_the_block_whatever_ends_it() -> None:
    layers, calls = [nn.Identity(), nn.Identity()], []
    with (
        pytest.raises(ValueError, match="broken"),
        removing(layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers),
    ):
        layers[0](torch.zeros(1))
        raise ValueError("broken")
    assert calls == [1]
    assert not any(layer._forward_hooks for layer in layers)


def test_hooks_go_where_a_later_one_cannot_be_registered() -> None:
    layers = [nn.Identity(), None]
    with pytest.raises(AttributeError), removing(layer.register_forward_hook(print) for layer in layers):
        raise AssertionError("the block must not be entered")
    assert not layers[0]._forward_hooks
