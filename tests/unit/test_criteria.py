"""Criteria of the literature: known answers, masks by hand, criteria from outside."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_slicing import site_of
from tiny_models import cut_parts, noise, qwen_call, tiny_qwen

from ppcl.config import FitConfig, load_config
from ppcl.errors import ConfigError, ModelError
from ppcl.modules.slicing import Units
from ppcl.pruning.criteria import CRITERIA, Site, unit_scores
from ppcl.pruning.criteria.base import signed_output, unit_sums
from ppcl.pruning.criteria.gblm import at_same_median, gblm_scores
from ppcl.pruning.criteria.wanda import wanda_scores
from ppcl.pruning.criteria.weight_masks import n_of_m_mask, row_mask
from ppcl.run import STAGES
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for


def setting(batch: int = 3) -> tuple[Any, Any, list[Site], dict[str, Any]]:
    transformer = tiny_qwen(2)
    sites = [site_of(transformer, 0, "attn"), site_of(transformer, 1, "img_mlp")]
    return transformer, adapter_for(transformer), sites, qwen_call(batch)


def gradients_of(transformer: Any, sites: list[Site], call: dict[str, Any], seed: int) -> list[list[Any]]:
    """Layer, side and gradient by plain autograd on a copy."""
    twin = copy.deepcopy(transformer).requires_grad_(True)
    signed_output(twin, call, seed, 0).backward()
    adapter = adapter_for(twin)
    return [[(layer, side, layer.weight.grad) for layer, side in s.weights(twin, adapter).values()] for s in sites]


def test_nirvana_sums_what_autograd_gives_and_leaves_no_gradient() -> None:
    transformer, adapter, sites, call = setting()
    found = CRITERIA["nirvana"].score(transformer, adapter, sites, [call], 5)
    wanted = gradients_of(transformer, sites, call, 5)
    for site, score, layers in zip(sites, found, wanted, strict=True):
        total = sum(unit_sums((g * layer.weight).abs(), site.units, side) for layer, side, g in layers)
        torch.testing.assert_close(score.float(), total.detach(), rtol=1e-4, atol=1e-7)
        assert (score > 0).all()  # student = teacher, where the distillation loss has no gradient
    assert all(p.grad is None for p in transformer.parameters())
    assert not transformer.is_gradient_checkpointing


def test_gblm_has_both_terms_of_every_layer_at_one_median() -> None:
    transformer, adapter, sites, call = setting(batch=1)  # one state: the norm is the gradient's size
    sites = sites[1:]
    (score,) = CRITERIA["gblm"].score(transformer, adapter, sites, [call], 5)
    inputs: dict[int, torch.Tensor] = {}
    layers = [layer for layer, _ in sites[0].weights(transformer, adapter).values()]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0].flatten(0, -2)}))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        velocity(transformer, call)
    for handle in handles:
        handle.remove()
    total = torch.zeros(128)
    for i, (layer, side, gradient) in enumerate(gradients_of(transformer, sites, call, 5)[0]):
        size = layer.weight.detach().abs()
        first = unit_sums(size * inputs[i].pow(2).mean(0).sqrt(), sites[0].units, side)
        second = unit_sums(size * gradient.abs(), sites[0].units, side)
        total += first + first.median() / second.median() * second
    torch.testing.assert_close(score.float(), total, rtol=1e-4, atol=1e-6)


def test_wanda_is_a_mean_and_gblm_takes_states_apart() -> None:
    transformer, adapter, sites, call = setting(batch=1)
    twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in call.items()}
    twice["img_shapes"] = call["img_shapes"] * 2
    assert batch_size(twice) == 2
    one, two = (CRITERIA["wanda"].score(transformer, adapter, sites, [c], 0) for c in (call, twice))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert all((s > 0).all() for s in CRITERIA["gblm"].score(transformer, adapter, sites, [twice], 0))


def test_wanda_by_hand() -> None:
    transformer, adapter, sites, call = setting()
    module = sites[1].module(transformer, adapter)
    seen: list[torch.Tensor] = []
    handle = module.net[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    (score,) = CRITERIA["wanda"].score(transformer, adapter, sites[1:], [call], 0)
    handle.remove()
    rms = seen[0].pow(2).mean(0).sqrt()
    wanted = (module.net[2].weight.abs() * rms).sum(0)
    torch.testing.assert_close(score.float(), wanted, rtol=1e-5, atol=1e-7)


def test_random_depends_on_the_seed_alone() -> None:
    transformer, adapter, sites, _ = setting()
    one, again, other = (CRITERIA["random"].score(transformer, adapter, sites, [], seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_weights_are_summed_to_their_units() -> None:
    values = torch.arange(8.0).reshape(4, 2)  # rows 0 1 | 2 3 | 4 5 | 6 7
    heads, gated = Units("heads", 2, ("a",), ("b",)), Units("narrow", 2, ("a",), ("b",))
    assert unit_sums(values, heads, 0).tolist() == [6, 22]  # neighbours
    assert unit_sums(values, gated, 0).tolist() == [10, 18]  # two halves
    assert unit_sums(values.T, heads, 1).tolist() == [6, 22]


# Masks


def test_scores_of_weights_by_hand() -> None:
    weight, rms = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([2.0, 0.5])
    gradient = torch.tensor([[0.0, 0.25], [0.5, 4.0]])
    assert wanda_scores(weight, rms).tolist() == [[2, 1], [6, 0.25]]
    assert gblm_scores(weight, rms, gradient, alpha=10).tolist() == [[2, 6], [21, 20.25]]
    # medians (the lower of two): 1 of the first term, 0.5 of the second
    assert gblm_scores(weight, rms, gradient).tolist() == [[2, 2], [9, 4.25]]
    assert at_same_median(rms, torch.zeros(2)).tolist() == [2, 0.5]


def test_rows_are_cut_alike_and_the_first_of_equals_stays() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [9.0, 9.0, 9.0, 9.0]])
    assert row_mask(scores, 0.5).int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert row_mask(scores, 0.25).sum(1).tolist() == [3, 3]
    assert row_mask(noise(5, 40), 0.3).sum(1).tolist() == [28] * 5
    assert row_mask(scores, 1.0).sum() == 0


def test_two_of_four() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, 4.0, 0.0, 0.0, 0.0, 7.0]])
    assert n_of_m_mask(scores).int().tolist() == [[0, 1, 0, 1, 1, 0, 0, 1]]
    assert n_of_m_mask(noise(3, 24), 1, 3).reshape(-1, 3).sum(1).tolist() == [1] * 24
    with pytest.raises(ModelError, match="rows of 8 weights do not divide into 2 of 3"):
        n_of_m_mask(scores, 2, 3)
    with pytest.raises(ModelError, match="1 of 4 scores are NaN"):
        row_mask(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]), 0.5)
    with pytest.raises(ModelError, match="from 0 to 1"):
        row_mask(scores, 1.5)


# From outside


def outside(folder: Path, body: str) -> str:
    (folder / "own.py").write_text(body)
    return f"{folder / 'own.py'}:Own"


HEAD = "import torch\nclass Own:\n    def score(self, transformer, adapter, sites, batches, seed):\n        return "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Other:\n    def score(self): ...\n", "has no 'Own'; with score: Other"),
        ("class Own:\n    pass\n", r"has no method score\(transformer, adapter"),
        ("class Own:\n    def score(self, model): ...\n", r"got score\(model\), expected score\(transformer"),
        ("class Own:\n    def __init__(self, k): ...\n", "made without arguments"),
        (
            "class Own:\n    def __init__(self):\n        raise KeyError('a\\nb')\n",
            "KeyError: .*made without arguments",
        ),
        ("import nowhere_at_all\n", "cannot be imported: ModuleNotFoundError"),
        ("def f(:\n", "cannot be imported: SyntaxError"),
        (HEAD + "[torch.ones(3) for s in sites]", r"got \(3,\), expected one score for each of 128 units"),
        (HEAD + "torch.ones(3)", "got Tensor for 1 sites"),
        (HEAD + "[torch.full((128,), float('nan'))]", "img_mlp: 128 of 128 scores are NaN"),
    ],
)
def test_what_is_wrong_with_a_criterion_is_one_line(body: str, message: str, tmp_path: Path) -> None:
    transformer, adapter, sites, call = setting()
    with pytest.raises(ConfigError, match=message) as caught:
        unit_scores(outside(tmp_path, body), transformer, adapter, sites[1:], [call], 0)
    assert "\n" not in str(caught.value)


def test_names_that_cannot_be_are_found_with_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.py"):
        load_config([], ["fit.criterion=nowhere.py:Own"])
    with pytest.raises(ConfigError, match=r"expected file\.py:ClassName"):
        load_config([], ["fit.criterion=nowhere.py"])
    with pytest.raises(ConfigError, match="did you mean 'wanda'"):
        load_config([], ["fit.criterion=wander"])
    assert CRITERIA.named("ppcl.pruning.criteria.wanda:Wanda").score is not None


def test_the_fit_stage_looks_at_it_before_it_removes_anything(tmp_path: Path) -> None:
    config = load_config([], ["fit.criterion=" + outside(tmp_path, "class Own:\n    pass\n")])
    with pytest.raises(ConfigError, match="has no method score"):
        STAGES["fit"].prepare(SimpleNamespace(out=tmp_path, config=config))


def test_another_criterion_in_the_same_file_is_another_fit(tmp_path: Path) -> None:
    name = outside(tmp_path, HEAD + "[torch.ones(128)]")
    first = FitConfig(criterion=name).identity()
    assert outside(tmp_path, HEAD + "[torch.arange(128.)]") == name
    assert FitConfig(criterion=name).identity() != first
    assert FitConfig().identity() == FitConfig().model_dump(exclude={"width_multiple"})  # 64, as it always was


def test_equal_scores_keep_the_first(tmp_path: Path) -> None:
    transformer, _, sites, call = setting()
    name = outside(tmp_path, HEAD + "[torch.ones(128)]")
    settings = FitConfig(criterion=name, width=("ffn",), width_shares=(0.25,))
    parts = cut_parts(transformer, sites[1], [[call]], settings, tmp_path)
    assert int(parts[0]["kept"], 16) == (1 << 32) - 1


@pytest.mark.parametrize("criterion", ["wanda", "activation", "gblm"])
def test_what_stands_in_the_padding_changes_no_score(criterion: str) -> None:
    """Qwen-Image: the text's padding is masked in the attention, so nothing else can change either."""
    model = tiny_qwen(2)
    adapter, clean = adapter_for(model), qwen_call(4, text=6, padded=True)
    noisy = {**clean, "encoder_hidden_states": clean["encoder_hidden_states"].clone()}
    noisy["encoder_hidden_states"][~clean["encoder_hidden_states_mask"].bool()] = 30.0
    site = site_of(model, 0, "txt_mlp")  # the last block's text feeds nothing
    one, other = (unit_scores(criterion, model, adapter, [site], [call], 0)[0] for call in (clean, noisy))
    assert torch.allclose(one, other, rtol=1e-3)
