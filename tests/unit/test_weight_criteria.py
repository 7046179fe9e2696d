"""Criteria of single weights and ECoFLaP: known answers, and no more gradients at a time than a block's."""

from __future__ import annotations

import copy
import math
import random
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_criteria import setting
from test_slicing import site_of
from tiny_models import noise, qwen_call, tiny_qwen
from torch.utils._python_dispatch import TorchDispatchMode

from ppcl.common.streams import Stream, step_generator
from ppcl.config.sparsity import SparsityConfig
from ppcl.errors import BudgetError, ConfigError
from ppcl.pruning.allocations import COUNTS, ecoflap_counts
from ppcl.pruning.criteria import CRITERIA
from ppcl.pruning.criteria.base import BACKWARD, signed_output
from ppcl.pruning.criteria.gblm import GblmWeights
from ppcl.pruning.criteria.weight_masks import n_of_m_mask, row_mask
from ppcl.pruning.criteria.weights import (
    WEIGHT_CRITERIA,
    Layer,
    Seen,
    weight_cost,
    weight_criterion_named,
    weight_scores,
)
from ppcl.pruning.criteria.zeroth_order import gradient_norm
from ppcl.pruning.sparsity import block_importance, make_masks, sparsity_cost
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for


def layers_of(transformer: Any, *names: str) -> list[Layer]:
    wanted = names or ("attn.to_q", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2")
    return [
        Layer(f"{i}/{name}", str(i), block.get_submodule(name))
        for i, block in enumerate(transformer.transformer_blocks)
        for name in wanted
    ]


def scored(name: str, transformer: Any, layers: list[Layer], calls: list[Any]) -> dict[str, torch.Tensor]:
    found = weight_scores(transformer, layers, calls, WEIGHT_CRITERIA[name], name, 5)
    return {layer.name: score for layer, score in found}


def state_gradients(transformer: Any, call: dict[str, Any], name: str) -> torch.Tensor:
    """Gradients of <u, v> of each state alone, (states, o, i), by plain autograd."""
    twin = copy.deepcopy(transformer)
    weight = twin.transformer_blocks[0].get_submodule(name).weight.requires_grad_(True)
    output = velocity(twin, call).float()
    signs = torch.randint(2, output.shape, generator=signs_of(5, 0)) * 2.0 - 1
    each = (output * signs).flatten(1).sum(1)
    return torch.stack([torch.autograd.grad(one, weight, retain_graph=True)[0] for one in each])


def signs_of(seed: int, step: int) -> torch.Generator:
    return step_generator(seed, step, Stream.OUTPUT_SIGNS)


def test_first_order_scores_are_what_autograd_gives() -> None:
    transformer, call, name = tiny_qwen(2), qwen_call(), "img_mlp.net.2"
    layers = layers_of(transformer, name)
    gradients = state_gradients(transformer, call, name)
    size = layers[0].module.weight.detach().abs()
    inputs: list[torch.Tensor] = []
    handle = layers[0].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        signed_output(transformer, call, 5, 0)
    handle.remove()
    wanda = size * inputs[0].pow(2).mean(0).sqrt()
    slope = size * gradients.abs().mean(0)
    wanted = {
        "magnitude": size,
        "wanda": wanda,
        "taylor": size * gradients.pow(2).mean(0).sqrt(),
        "nirvana": size * gradients.sum(0).abs(),
        "gblm": wanda + wanda.median() / slope.median() * slope,
    }
    for criterion, expected in wanted.items():
        found = scored(criterion, transformer, layers, [call])["0/" + name]
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7, msg=criterion)


def test_every_first_order_score_is_positive_where_student_and_teacher_agree() -> None:
    transformer, adapter, sites, call = setting()
    for name, criterion in CRITERIA.items():
        if name == "bip":  # its loss is of a masked model, and its least score is 0
            assert all(score.max() > 0 for score in criterion.score(transformer, adapter, sites, [call], 5))
        elif name not in ("random", "magnitude", "wanda", "activation"):
            assert all((score > 0).all() for score in criterion.score(transformer, adapter, sites, [call], 5)), name
    layers = layers_of(transformer, "attn.to_q", "img_mlp.net.2")
    for name in ("gblm", "taylor", "nirvana"):
        assert all((score > 0).float().mean() > 0.99 for score in scored(name, transformer, layers, [call]).values())
    assert block_importance(transformer, layers[:2], [call], 1e-3, 0, 0) > 0


def test_masks_of_gblm_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    rms, slope = torch.tensor([4.0, 1.0, 1.0, 0.5]), torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]])
    score = GblmWeights().score(Seen(weight, rms, slope, slope, torch.Generator()))
    # |W| a: 4 2 3 2 | 4 1 1 .5, median 2; |W| |G|: 1 2 0 0 | 0 0 2 1, median 0: the second term is left out
    assert score.tolist() == [[4, 2, 3, 2], [4, 1, 1, 0.5]]
    slope[0, 2:], slope[1, :2] = 1.0, 1.0
    score = GblmWeights().score(Seen(weight, rms, slope, slope, torch.Generator()))
    # |W| |G|: 1 2 3 4 | 1 1 2 1, median 1: it counts twice
    assert score.tolist() == [[6, 6, 9, 10], [6, 3, 5, 2.5]]
    assert row_mask(score, 0.5).int().tolist() == [[0, 0, 1, 1], [1, 0, 1, 0]]  # each row by itself
    assert n_of_m_mask(score, 1, 2).int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]  # of equals the first


class Peak(TorchDispatchMode):
    """Counts matrices of some shapes that are alive at once, the weights themselves left out."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.alive, self.peak = shapes, 0, 0

    def _gone(self) -> None:
        self.alive -= 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            owns = isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self.shapes and not tensor._is_view()
            if owns and tensor.requires_grad is False:
                self.alive += 1
                self.peak = max(self.peak, self.alive)
                weakref.finalize(tensor, self._gone)
        return output


def peaks(name: str, num_blocks: int) -> tuple[int, int]:
    """Matrices of gradients, and what is made of them, alive at once while units and weights are scored."""
    transformer, call = tiny_qwen(num_blocks), qwen_call(2, text=7)
    sites = [site_of(transformer, i, "img_mlp") for i in range(num_blocks)]
    with Peak({(128, 32), (32, 128)}) as units:
        CRITERIA[name].score(transformer, adapter_for(transformer), sites, [call], 0)
    layers = layers_of(transformer, "img_mlp.net.0.proj", "img_mlp.net.2")
    with Peak({(128, 32), (32, 128)}) as weights:
        for _ in weight_scores(transformer, layers, [call], WEIGHT_CRITERIA[name], name, 0):
            pass
    assert all(p.grad is None and not p.requires_grad for p in transformer.parameters())
    return units.peak, weights.peak


@pytest.mark.parametrize("name", ["gblm", "taylor", "nirvana"])
def test_no_more_gradients_are_alive_than_those_of_one_block(name: str) -> None:
    few, many = peaks(name, 2), peaks(name, 6)
    assert all(abs(a - b) <= 2 for a, b in zip(few, many, strict=True)), (few, many)  # however many blocks there are
    assert many[0] <= 6  # of 12 matrices
    assert 4 <= many[1] <= 14  # sums of both norms for a block's two, and what a score is made of


def test_the_estimate_is_the_gradient_norm_on_a_quadratic() -> None:
    weight, centre, scale = noise(6, 5, seed=1), noise(6, 5, seed=2), noise(6, 5, seed=3).abs() + 0.5
    before, draws = weight.clone(), 4000

    def loss() -> float:
        return float((scale * (weight - centre).pow(2)).double().sum())

    generator = torch.Generator().manual_seed(0)
    found = gradient_norm(loss, [weight[:3], weight[3:]], generator, 1e-2, draws)
    exact = float((2 * scale * (before - centre)).norm())
    error = math.sqrt(math.pi / 2 - 1) / math.sqrt(draws)  # relative standard error of a mean of |normal|
    assert abs(found / exact - 1) < 3 * error
    assert torch.equal(weight, before)  # put back to the last bit
    # where the gradient is zero (the loss of distillation at student = teacher) so is the estimate
    weight.copy_(centre)
    assert gradient_norm(loss, [weight], generator, 1e-2, 8) == pytest.approx(0, abs=1e-4)


def test_weights_in_half_precision_come_back_after_an_error() -> None:
    weight = noise(4, 4).bfloat16()
    before = weight.clone()

    def loss() -> float:
        assert not torch.equal(weight, before)  # moved at all
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        gradient_norm(loss, [weight], torch.Generator(), 1e-1)
    assert torch.equal(weight, before)


def test_counts_add_up_whatever_the_blocks() -> None:
    draw = random.Random(0)
    for _ in range(400):
        sizes = [draw.choice([1, 7, 10 ** draw.randint(1, 8)]) for _ in range(draw.randint(1, 9))]
        importance = [draw.choice([0, 10 ** draw.uniform(-6, 6)]) for _ in sizes]
        share, slack = draw.random() * 0.99, draw.choice([0, 0.1, 1])
        for counts in COUNTS.values():
            found = counts(sizes, importance, share, slack)
            assert sum(found) == round((1 - share) * sum(sizes))
            assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))


def test_ecoflap_by_hand() -> None:
    # half of 300 stays; the floor is 0.4 each, 120; 30 are left, in the ratio 1 : 2 : 3
    assert ecoflap_counts([100, 100, 100], [1, 2, 3], 0.5, 0.1) == [45, 50, 55]
    # p_max = 1: no floor; the third would get 250 of its 100, and what is over goes to the others, 1 : 2
    assert ecoflap_counts([100, 100, 100], [1, 2, 30], 0.5, 0.5) == [17, 33, 100]
    with pytest.raises(BudgetError, match="finite"):
        ecoflap_counts([1, 1], [1.0, float("nan")], 0.5, 0.1)


def test_the_same_states_and_signs_go_both_ways() -> None:
    transformer, call = tiny_qwen(2), qwen_call()
    layers = layers_of(transformer, "img_mlp.net.2")[:1]
    found = [block_importance(transformer, layers, [call], 1e-3, seed, 0) for seed in range(40)]
    exact = []
    for seed in range(40):
        twin = copy.deepcopy(transformer)
        weight = twin.transformer_blocks[0].img_mlp.net[2].weight.requires_grad_(True)
        exact.append(float(torch.autograd.grad(signed_output(twin, call, seed, 0), weight)[0].norm()))
    assert sum(found) / sum(exact) == pytest.approx(1, abs=0.4)  # three standard errors of 40 draws


def test_each_says_what_it_costs() -> None:
    wanted = {"magnitude": 0, "random": 0, "wanda": 8, "gblm": 8 * 3 * BACKWARD, "nirvana": 8 * 3 * BACKWARD}
    assert {name: weight_cost(WEIGHT_CRITERIA[name], 8, 3) for name in wanted} == wanted
    chosen = SparsityConfig(share=0.5, criterion="gblm", allocation="ecoflap", blocks_at_once=4)
    assert sparsity_cost(chosen, 8, 9) == 8 * 3 * BACKWARD + 2 * 8 * 9
    assert chosen.identity() == chosen.model_copy(update={"blocks_at_once": 1}).identity()


def test_blocks_at_once_are_the_same_masks() -> None:
    transformer, call = tiny_qwen(3), qwen_call()
    layers = layers_of(transformer)
    one, two = (
        make_masks(transformer, layers, [call], SparsityConfig(share=0.5, criterion="gblm", blocks_at_once=n), 0)
        for n in (1, 2)
    )
    assert list(one) == [layer.name for layer in layers]
    assert all(torch.equal(one[name], mask) for name, mask in two.items())


HEAD = "import torch\nclass Own:\n    needs = 'weights'\n    def score(self, seen):\n        return "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Own:\n    needs = 'all'\n    def score(self, seen): ...\n", "needs is 'all', expected one of weights"),
        ("class Own:\n    def score(self, weight, rms): ...\n", r"got score\(weight, rms\), expected score\(seen\)"),
        (HEAD + "seen.weight[0]", r"0/attn.to_q: got \(32,\), expected one score for each weight, \(32, 32\)"),
        (HEAD + "seen.weight / 0 * 0", "1024 of 1024 scores are NaN or infinite"),
    ],
)
def test_what_is_wrong_with_a_criterion_is_one_line(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(body)
    name, transformer = f"{tmp_path / 'own.py'}:Own", tiny_qwen(1)
    with pytest.raises(ConfigError, match=message) as caught:
        made = weight_criterion_named(name)
        list(weight_scores(transformer, layers_of(transformer), [], made, name, 0))
    assert "\n" not in str(caught.value)


def test_a_criterion_from_outside_and_equal_scores(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(HEAD + "torch.ones_like(seen.weight)\n")
    chosen = SparsityConfig(share=0.25, criterion=f"{tmp_path / 'own.py'}:Own")
    transformer = tiny_qwen(1)
    masks = make_masks(transformer, layers_of(transformer, "attn.to_q"), [], chosen, 0)
    assert masks["0/attn.to_q"].int().tolist() == [[1] * 24 + [0] * 8] * 32  # of equals the first stay


def test_the_toy_criterion_of_the_docs_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(# my_weights\.py\n.*?)```", text, re.DOTALL)
    assert source is not None
    (tmp_path / "my_weights.py").write_text(source[1])
    transformer, call = tiny_qwen(1), qwen_call()
    chosen = SparsityConfig(share=0.5, criterion=f"{tmp_path / 'my_weights.py'}:Smooth")
    masks = make_masks(transformer, layers_of(transformer), [call], chosen, 0)
    assert {int(mask.sum()) * 2 - mask.numel() for mask in masks.values()} == {0}
