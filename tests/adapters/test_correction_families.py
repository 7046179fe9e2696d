"""Which layers the closed-form correction finds in every supported class, and that states are affine in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TINY
from torch.utils._pytree import tree_map

from ppcl.distill.correction import last_layers
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import run_traced

# these end in a norm or a convolution
NONE = {"ideogram4", "lumina2", "lumina_next", "mochi", "sana", "sana_video", "z_image"}


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_leaves_a_block_is_affine_in_its_last_layers(name):
    torch.manual_seed(0)
    model, arguments = TINY[name]()
    adapter, calls = adapter_for(model), []
    model.eval().requires_grad_(True)
    with torch.no_grad():
        run_traced(model, adapter, arguments, lambda call: calls.append(call) if call.index == 1 else None)
    assert calls
    for call in calls:
        block = adapter.blocks(model, call.stack)[1].double()
        call = double(call)
        layers = last_layers(adapter, block, call)
        assert bool(layers) == (name not in NONE)
        with torch.no_grad():
            states = [adapter.call(call.stack, block, call.inputs, call.arguments)]
            for _ in range(2):
                for layer in layers.values():
                    for parameter in layer.parameters():
                        parameter += 1
                states.append(adapter.call(call.stack, block, call.inputs, call.arguments))
        for stream in call.stack.outputs if layers else ():
            first, second = (states[n + 1][stream] - states[n][stream] for n in range(2))
            assert first.norm() > 0
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)  # some compute in float32


def double(call):
    """The same call in float64."""

    def cast(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    arguments, inputs = tree_map(cast, (call.arguments, call.inputs))
    return replace(call, arguments=arguments, inputs=inputs)
