"""Which tokens are no padding: every form of mask, every place that asks."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY

from ppcl.analysis.findings import Findings
from ppcl.analysis.sweep import Batch, LayerCall, Seen
from ppcl.config import FitConfig
from ppcl.errors import ModelError
from ppcl.modules.slicing import neurons_of
from ppcl.pruning.criteria import unit_scores
from ppcl.pruning.criteria.base import Site
from ppcl.pruning.criteria.weights import WEIGHT_CRITERIA, Layer, weight_scores
from ppcl.pruning.fewer_units import UnitSums
from ppcl.pruning.unit_search import CutSite
from ppcl.teacher.families import StackSpec, adapter_for
from ppcl.teacher.families.masks import stream_of, valid_of, valid_tokens, watch_valid
from ppcl.teacher.trace import record_boundaries

KEPT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
QUERIES = KEPT[:, None, None, :].expand(-1, 1, 5, -1)
FORMS = {
    "bool": KEPT,
    "int": KEPT.long(),
    "float": KEPT.float(),
    "added": torch.zeros(2, 5).masked_fill(~KEPT, -10_000.0),
    "infinite": torch.zeros(2, 5).masked_fill(~KEPT, -torch.inf),
    "heads": KEPT[:, None, None, :],
    "heads added": torch.zeros(2, 1, 1, 5).masked_fill(~KEPT[:, None, None], torch.finfo(torch.float16).min),
    "queries": QUERIES,
    "queries of valid tokens": QUERIES & QUERIES.transpose(2, 3),
    "three": KEPT[:, None, :],
}


def streams(image: int = 3, text: int = 2, first: bool = False) -> dict[str, torch.Tensor]:
    states = {"hidden_states": torch.zeros(2, image, 4), "encoder_hidden_states": torch.zeros(2, text, 4)}
    return {name: state.transpose(0, 1) if first else state for name, state in states.items()}


def spec(masks: dict[str, str], first: bool = False) -> StackSpec:
    inputs = {"image": "hidden_states", "text": "encoder_hidden_states"}
    return StackSpec("s", "n", inputs, ("image", "text"), masks=masks, tokens_first=first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True])
def test_every_form_over_one_stream_and_over_all(form: str, first: bool) -> None:
    own = valid_tokens(spec({"text": "m"}, first), {**streams(7, 5, first), "m": FORMS[form]})
    assert torch.equal(own["text"], KEPT)
    assert set(own) == {"text"}
    both = valid_tokens(spec({"image": "m", "text": "m"}, first), {**streams(3, 2, first), "m": FORMS[form]})
    assert torch.equal(both["image"], KEPT[:, :3])
    assert torch.equal(both["text"], KEPT[:, 3:])


def test_no_mask_and_a_mask_for_all_samples() -> None:
    assert valid_tokens(spec({"text": "m"}), {**streams(), "m": None}) == {}
    assert valid_tokens(spec({"text": "m"}), streams()) == {}
    one = valid_tokens(spec({"text": "m"}), {**streams(7, 5), "m": torch.zeros(1, 1, 1, 5)})
    assert one["text"].shape == (2, 5)
    assert one["text"].all()


def test_a_mask_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"s: got a mask m of \(2, 5\), expected 9 tokens \(text\) or 11"):
        valid_tokens(spec({"text": "m"}), {**streams(2, 9), "m": KEPT})


def test_modules_inside_a_block_see_one_stream_or_all() -> None:
    stack = spec({"image": "m", "text": "m"})
    given = {**streams(3, 2), "m": KEPT}
    assert stream_of(stack, "attn.to_add_out") == "text"
    expected = {3: KEPT[:, :3], 2: KEPT[:, 3:], 5: KEPT}
    for count, valid in expected.items():
        found = valid_of(stack, given, "proj", torch.zeros(2, count, 8))
        assert found is not None
        assert torch.equal(found, valid)
    assert valid_of(stack, given, "norm.linear", torch.zeros(2, 8)) is None
    same = {**streams(5, 5), "m": KEPT}
    assert valid_of(spec({"text": "m"}), same, "ff", torch.zeros(2, 5, 8)) is None
    assert valid_of(spec({"text": "m"}), same, "attn.add_k_proj", torch.zeros(2, 5, 8)) is not None


def padded(name: str):
    """A tiny model and a call of two samples whose second has text of half the length."""
    torch.manual_seed(0)
    model, arguments = TINY[name]()
    model.eval().requires_grad_(False)
    return model, arguments, adapter_for(model)


def masked(model, arguments, adapter):
    """By stack, what the masks of a call say, of stacks where something is padding."""
    calls, _ = record_boundaries(model, adapter, arguments)
    found = {}
    for (stack, index), call in calls.items():
        if index == 0:
            valid = valid_tokens(call.stack, call.arguments)
            for stream, mask in valid.items():
                assert mask.shape == call.inputs[stream].shape[:2]
            found[stack] = valid
    return found


@pytest.mark.parametrize("name", sorted(TINY))
def test_masks_of_every_family_fit_its_states(name: str) -> None:
    model, arguments, adapter = padded(name)
    assert set(masked(model, arguments, adapter)) == {spec.name for spec in adapter.stacks}


@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_video"])
def test_padded_text_does_not_count_where_the_mask_is_over_both_streams(name: str, tmp_path) -> None:
    model, arguments, adapter = padded(name)
    text = arguments["encoder_attention_mask"].clone()
    text[-1, text.shape[1] // 2 :] = 0
    arguments = {**arguments, "encoder_attention_mask": text}
    for valid in masked(model, arguments, adapter).values():
        assert valid["image"].all()
        assert torch.equal(valid["text"].sum(1), text.sum(1).to(valid["text"].sum(1).dtype))
    spec_ = adapter.stacks[0]
    path = spec_.ffn["text"]
    ffn = adapter.blocks(model, spec_)[0].get_submodule(path)
    units = neurons_of(ffn)
    site = Site(spec_.name, 0, path, units)
    layer = ffn.get_submodule(units.columns[0])
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with watch_valid(model, adapter), torch.no_grad():
        model(**arguments, return_dict=False)
    handle.remove()
    calls, _ = record_boundaries(model, adapter, arguments, {(spec_.name, 0)})
    keep = valid_tokens(spec_, calls[spec_.name, 0].arguments)["text"]
    rows = seen[0][keep].double()
    assert len(rows) < seen[0].shape[0] * seen[0].shape[1]

    sums = UnitSums([CutSite("ffn", (site,))], (), FitConfig(), None, Findings(tmp_path))
    paths = sums.begin(spec_, 0, adapter.blocks(model, spec_)[0])
    layers = {path: [LayerCall(seen[0], None)] for path in paths}
    sums.see(Seen(Batch(0, "train", 0, None), calls[spec_.name, 0], layers))
    assert sums.moments[f"{path}.{units.columns[0]}"].count == len(rows)
    energy = layer.weight.double().abs() * rows.pow(2).mean(0).sqrt()
    (wanda,) = unit_scores("wanda", model, adapter, [site], [arguments], 0)
    assert torch.allclose(wanda, energy.sum(0), rtol=1e-4)
    (activation,) = unit_scores("activation", model, adapter, [site], [arguments], 0)
    spread = rows.var(0, correction=0) * layer.weight.double().pow(2).sum(0)
    assert torch.allclose(activation, spread.sqrt(), rtol=1e-3)
    scored = weight_scores(
        model, [Layer(f"0/{path}.{units.columns[0]}", "0", layer)], [arguments], WEIGHT_CRITERIA["wanda"], "wanda", 0
    )
    ((_, score),) = scored
    assert torch.allclose(score.double(), energy, rtol=1e-4)
