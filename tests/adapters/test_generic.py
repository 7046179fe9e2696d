"""Inference from the source, the check on one call, refused classes, and the table."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny import TIMES, TINY, flux_like
from torch import nn
from typer.testing import CliRunner

from ppcl.cli import app
from ppcl.errors import ModelError
from ppcl.student.assembly import start_block, with_blocks
from ppcl.teacher.families import (
    ADAPTERS,
    REFUSED,
    Adapter,
    StackSpec,
    adapter_class,
    adapter_for,
    check_inferred,
    fixed_tail,
)
from ppcl.teacher.families.generic import check_adapter, infer, return_order
from ppcl.teacher.families.listing import family_rows, transformer_classes
from ppcl.teacher.flops import count_params

# What the source alone does not tell, and these descriptions therefore add.
NOT_INFERRED = {
    "CosmosTransformer3DModel": "returns differ",
    "Flux2Transformer2DModel": "returns differ",
    "MochiTransformer3DModel": "last block differs",
    "SD3Transformer2DModel": "last block differs",
    "ZImageTransformer2DModel": "blocks are given their number (and do not use it)",
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x, shift):
        return x + self.layer(x) + shift


class Plain(ModelMixin, ConfigMixin):
    """A class that nobody described."""

    @register_to_config
    def __init__(self, width=8, depth=4, own_shift=False, between=False, transpose=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, hidden_states, return_dict=True):
        h = hidden_states.transpose(0, 1) if self.config.transpose else hidden_states
        for index, block in enumerate(self.blocks):
            h = block(h, torch.full((1,), float(index if self.config.own_shift else 1)))
            if self.config.between:
                h = h * 2
        return (h,)


class Numbered(Plain):
    def __init__(self, depth=4):
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList([Block(8 + i) for i in range(depth)])


class TwoWays(nn.Module):
    def forward(self, x, two=False):
        if two:
            return x, x
        return x


def stack_key(stack):
    return stack.name, stack.count_field, dict(stack.inputs), stack.outputs


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - set(NOT_INFERRED)))
def test_the_source_tells_what_the_description_says(name):
    inferred = {stack.name: stack_key(stack) for stack in infer(getattr(diffusers, name)).stacks}
    for stack in ADAPTERS[name].stacks:  # a description may leave a list out (Kandinsky's text blocks)
        assert inferred[stack.name] == stack_key(stack)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_description_passes_the_check_on_one_call(name):
    torch.manual_seed(0)
    model, arguments = TINY[name]()
    check_adapter(model.eval(), adapter_for(model), arguments, samples=2)
    check_inferred(model, {}, 2)  # tested families are not called again
    for stack in adapter_for(model).stacks:
        block = adapter_for(model).blocks(model, stack)[0]
        for path in [*stack.ffn.values(), *filter(None, [stack.text_qkv])]:
            assert isinstance(block.get_submodule(path), nn.Module)


def test_an_unknown_class_is_inferred_with_a_warning(caplog):
    model = Plain()
    adapter = adapter_for(model)
    assert adapter == Adapter(("Plain",), (StackSpec("blocks", "depth", {"image": "x"}, ("image",)),))
    assert "Plain is not among the tested families" in caplog.text
    check_inferred(model, {"hidden_states": torch.randn(2, 3, 8)}, 2)
    assert fixed_tail(model, "blocks") == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"own_shift": True}, "block 1 of blocks gets a 'shift' of its own"),
        ({"between": True}, "something happens between blocks 0 and 1"),
        ({"transpose": True}, "are not \\(samples, tokens, features\\)"),
    ],
)
def test_a_call_shows_what_the_source_does_not(config, says):
    model = Plain(**config)
    with pytest.raises(ModelError, match=f"Plain cannot be compressed: .*{says}"):
        check_inferred(model, {"hidden_states": torch.randn(2, 3, 8)}, 2)


def test_a_wrong_count_is_noticed():
    model = Plain()
    model.blocks = model.blocks[:3]
    with pytest.raises(ModelError, match="depth is 4, but blocks has 3 blocks"):
        check_inferred(model, {"hidden_states": torch.randn(2, 3, 8)}, 2)


def test_what_cannot_be_inferred_says_why():
    with pytest.raises(ModelError, match="Numbered is not supported yet: the blocks of blocks differ by number"):
        adapter_class(Numbered)
    with pytest.raises(ModelError, match="TwoWays returns is not one tensor or one tuple"):
        return_order(TwoWays)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_classes_are_refused_before_loading(name):
    kind = transformer_classes()[name]
    with pytest.raises(ModelError) as error:
        adapter_class(kind)
    assert str(error.value).startswith(f"{name} is not supported yet: {REFUSED[name]}")
    assert "\n" not in str(error.value)


def test_a_table_of_modulation_is_found_on_the_first_call():
    """Chroma is refused by name; the check finds the reason by itself."""
    torch.manual_seed(0)
    small = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model, arguments = flux_like("ChromaTransformer2DModel", {"timestep": TIMES}, **small)
    with pytest.raises(ModelError, match="gets a 'temb' of its own"):
        check_adapter(model.eval(), infer(type(model)), arguments, samples=2)


def test_no_class_is_in_both_tables():
    assert not set(ADAPTERS) & set(REFUSED)
    assert set(ADAPTERS) | set(REFUSED) <= set(transformer_classes())


def test_rows_name_status_and_reason():
    classes = {name: transformer_classes()[name] for name in ("SD3Transformer2DModel", "HunyuanDiT2DModel")}
    rows = family_rows({**classes, "Plain": Plain, "Numbered": Numbered})
    assert [(name, status) for name, status, *_ in rows] == [
        ("SD3Transformer2DModel", "supported"),
        ("Plain", "inferred"),
        ("HunyuanDiT2DModel", "refused"),
        ("Numbered", "unknown"),
    ]
    assert rows[0][2] == "`transformer_blocks` (`num_layers`; image + text, last one stays)"


def test_the_command_writes_the_table(tmp_path):
    path = tmp_path / "families.md"
    result = CliRunner().invoke(app, ["families", "--table", str(path)])
    assert result.exit_code == 0
    text = path.read_text()
    assert "| FluxTransformer2DModel | supported |" in text
    assert all(f"| {name} | refused | {reason} |" in text for name, reason in REFUSED.items())


def test_the_fixed_tail_stays_and_can_be_copied():
    torch.manual_seed(0)
    model, _ = TINY["sd3"]()
    adapter = adapter_for(model)
    (spec,) = adapter.stacks
    assert len(adapter.blocks(model, spec)) == len(model.transformer_blocks) - 1
    shared = with_blocks(model, {spec.name: list(adapter.blocks(model, spec))[:2]})
    assert [id(block) for block in shared.transformer_blocks] == [id(model.transformer_blocks[i]) for i in (0, 1, -1)]
    owned = with_blocks(model, {spec.name: list(adapter.blocks(model, spec))[:2]}, own=True)
    assert owned.transformer_blocks[-1] is not model.transformer_blocks[-1]


@pytest.mark.parametrize(("start", "dual"), [("first", True), ("mean", True), ("middle", True), ("last", False)])
def test_substitutes_of_mixed_runs_have_the_shape_of_their_start(start, dual):
    """SD3.5 medium: blocks 0..2 have a second attention, 3 and 4 have none."""
    torch.manual_seed(0)
    model, _ = TINY["sd35_medium"]()
    block = start_block(model.transformer_blocks, 1, 3, start)
    assert (block.attn2 is not None) == dual
    assert count_params(block) == count_params(model.transformer_blocks[1 if dual else 3])
