"""Which modules of each family can lose neurons or heads, and that a text stream becomes what eq. 8 says."""

import pytest
import tiny
import torch

from ppcl.modules.replacements import apply_width
from ppcl.modules.text_stream import plain_norm
from ppcl.pruning.fewer_units import find_sites
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries

DUAL = "transformer_blocks"
BOTH = {"ffn.image", "ffn.text"}
OFFERED = {
    "qwen": {DUAL: {*BOTH, "attention"}},
    "flux": {DUAL: {*BOTH, "attention"}},
    "sd35_medium": {DUAL: {*BOTH, "attention", "attention.attn", "attention.attn2"}},
    "z_image": {"layers": {"ffn.image", "attention"}},
    "lumina2": {"layers": {"ffn.image"}},  # fewer heads for keys and values than for queries
    "wan": {"blocks": {"ffn.image"}},  # QK norms over all heads
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def first_calls(family):
    model, arguments = getattr(tiny, family)()
    model.eval().requires_grad_(False)
    adapter = adapter_for(model)
    return model, adapter, record_boundaries(model, adapter, arguments, {(s.name, 0) for s in adapter.stacks})[0]


@pytest.mark.parametrize("family", OFFERED)
def test_what_is_offered_is_what_can_be_cut(family):
    model, _, calls = first_calls(family)
    found = {}
    for site in find_sites(ResidentBlocks(model), calls, ("ffn", "attention")):
        found.setdefault(site.site.stack, set()).add(site.group)
    assert found == OFFERED[family]


@pytest.mark.parametrize("family", ["qwen", "flux", "sd35_medium"])
def test_the_stock_forward_computes_two_linear_maps(family):
    """z = Norm(h) A + a at the projections, h + h W + w at the output."""
    model, adapter, calls = first_calls(family)
    spec = adapter.stacks[0]
    block, call = adapter.blocks(model, spec)[0], calls[spec.name, 0]
    norm_path, ffn_path = (
        next(path for path, kind in spec.text_parts.items() if kind == wanted)
        for wanted in ("text_input", "text_output")
    )
    norm = plain_norm(block.get_submodule(norm_path))
    before = adapter.call(spec, block, call.inputs, call.arguments)
    apply_width(block, {path: {"kind": kind, "size": 0} for path, kind in spec.text_parts.items()})
    seen = []
    block.get_submodule(spec.text_qkv).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    after = adapter.call(spec, block, call.inputs, call.arguments)
    h = call.inputs["text"]
    torch.testing.assert_close(seen[0], block.get_submodule(norm_path).linear(norm(h)))
    torch.testing.assert_close(after["text"], h + block.get_submodule(ffn_path)(h))
    assert (after["image"] - before["image"]).norm() > 1e-3 * before["image"].norm()  # it reads the new projections
