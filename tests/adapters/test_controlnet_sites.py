"""Where the families' own code adds a ControlNet's residuals, against where the bridge puts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import sana, sd3, z_image
from torch import Tensor

from ppcl.pipelines.controlnet import control_family, expand_residuals
from ppcl.teacher.block_map import block_maps
from ppcl.teacher.families import adapter_for

FAMILIES = {  # argument, and how many residuals a ControlNet may have
    sd3: ("block_controlnet_hidden_states", (1, 2, 3, 4, 6)),
    sana: ("controlnet_block_samples", (1, 2, 4)),
    z_image: ("controlnet_block_samples", (1, 2, 5)),
}


def between_blocks(transformer: Any, call: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What leaves each block of the picture's stream, and what is added before the next one."""
    adapter = adapter_for(transformer)
    spec = adapter.stacks[0]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def watch(block: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs.append(adapter.bind(block, args, kwargs)[spec.inputs["image"]])
        outputs.append(out[-1] if isinstance(out, tuple) else out)

    handles = [b.register_forward_hook(watch, with_kwargs=True) for b in getattr(transformer, spec.name)]
    with torch.no_grad():
        transformer(**call, return_dict=False)
    for handle in handles:
        handle.remove()
    return outputs, [after - before for before, after in zip(outputs, inputs[1:], strict=False)]


@pytest.mark.parametrize(("make", "count"), [(make, n) for make, (_, counts) in FAMILIES.items() for n in counts])
def test_the_bridge_follows_each_familys_own_code(make: Any, count: int) -> None:
    transformer, call = make()
    family, stack = control_family(transformer), adapter_for(transformer).stacks[0].name
    states, nothing = between_blocks(transformer, call)
    assert not any(residual.any() for residual in nothing)
    samples: Any = [torch.randn_like(states[0]) for _ in range(count)]
    if family.numbered:  # at some blocks, the first among them
        samples = dict(zip(range(0, len(states), -(-len(states) // count)), samples, strict=False))
    _, added = between_blocks(transformer, {**call, family.arguments[stack]: samples})
    assert family.arguments[stack] == FAMILIES[make][0]
    found = expand_residuals(samples, block_maps({stack: [0, [1, 2], *range(3, len(states))]})[stack], family)
    placed = found if isinstance(found, dict) else dict(enumerate(found, family.first))
    for position, residual in enumerate([added[0], added[1] + added[2], *added[3:]]):
        torch.testing.assert_close(placed.get(position, 0 * residual), residual, atol=1e-5, rtol=1e-4)
