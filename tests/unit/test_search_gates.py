"""Gates on blocks: RARTS's toy problem, learned masks, and both on a teacher with blocks that do nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search_path import tiny_context
from tiny_models import flux_call, qwen_call, tiny_flux, tiny_qwen
from torch import Tensor

from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.errors import ArtifactError, BudgetError, ModelError
from ppcl.pruning.planner import meets
from ppcl.pruning.searches import choose, gates, learned, rarts
from ppcl.pruning.searches.gates import GatedStudent
from ppcl.pruning.searches.learned import Learned, groups_of, gumbel, quotas_of, ways
from ppcl.pruning.searches.rarts import Player, Rarts, excess, gauss_seidel
from ppcl.pruning.searches.teacher import Teacher
from ppcl.teacher.families import adapter_for
from ppcl.training.distributed import WHOLE


def play(factor: float, beta: float, rounds: int, rate: float) -> tuple[float, float, float]:
    """RARTS on L_val = a y - 2 a + 1, L_train = w^2 - 2 a w + a^2, from (w, y, a) = (-2, -2, 2)."""
    w, y, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-2.0, -2.0, 2.0))
    players = [Player([v], torch.optim.SGD([v], rate)) for v in (w, y, a)]
    for _ in range(rounds):
        gauss_seidel(
            *players,
            train=lambda: w**2 - 2 * a * w + a**2,
            validate=lambda: a * y - 2 * a + 1,
            penalty=lambda: 0 * a,
            factor=factor,
            beta=beta,
        )
    return w.item(), y.item(), a.item()


@pytest.mark.parametrize(("factor", "beta"), [(10.0, 10.0), (5.0, 20.0)])
def test_the_analytic_problem_ends_at_its_fixed_point(factor: float, beta: float) -> None:
    w, y, a = play(factor, beta, 600, 0.03)
    fixed = 2 / (2 - 1 / (2 * factor) - 1 / beta)
    assert a == pytest.approx(fixed, rel=1e-3)
    assert w == pytest.approx(fixed * (1 - 1 / (2 * factor)), rel=1e-3)
    assert y == pytest.approx(2 - fixed, rel=1e-3)


def test_the_analytic_problem_tends_to_one_and_one() -> None:
    ends = [play(size, size, int(30 * size), 0.3 / size) for size in (5.0, 10.0, 20.0)]
    distances = [max(abs(w - 1), abs(a - 1)) for w, _, a in ends]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.05


def test_without_the_second_set_of_weights_it_ends_elsewhere() -> None:
    """One level on one set (y = w, no tie) has its minimum elsewhere: the split is what RARTS adds."""
    w, a = (torch.tensor(value, requires_grad=True) for value in (-2.0, 2.0))
    for _ in range(3000):
        loss = (a * w - 2 * a + 1) + (w**2 - 2 * a * w + a**2)
        for v, g in zip((w, a), torch.autograd.grad(loss, (w, a)), strict=True):
            v.data -= 0.01 * g
    assert abs(a.item() - 1) > 0.2


# Masks


def test_ways_and_draws() -> None:
    assert ways(4, 1).sum(1).tolist() == [3] * 4
    assert len(ways(4, 2)) == 6
    assert ways(3, 0).tolist() == [[1, 1, 1]]
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    draws = gumbel(logits, 1.0, generator, 4000)
    assert sorted(draws[0].tolist()) == pytest.approx([0, 0, 1], abs=1e-6)
    torch.testing.assert_close(draws.mean(0), logits.softmax(0), atol=0.03, rtol=0)  # a categorical sample
    (gradient,) = torch.autograd.grad(draws[:200, 2].sum(), [logits])
    assert gradient[2] > 0 > gradient[0]


def test_each_sample_has_its_own_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tiny_qwen(6), qwen_call, tmp_path, keep=0.8, search_steps=2, search_batch=2)
    seen: list[Tensor] = []
    plain = GatedStudent.loss
    monkeypatch.setattr(GatedStudent, "loss", lambda self, call, g: seen.append(g.detach()) or plain(self, call, g))
    choose("learned", context)
    masks = [mask for mask in seen if mask.ndim == 2]
    assert [tuple(mask.shape) for mask in masks] == [(2, len(context.removable()))] * 2
    assert any(not torch.equal(*mask.round()) for mask in masks)
    assert len({float(row.sum().round()) for mask in masks for row in mask}) == 1  # as many blocks go in each


@pytest.mark.parametrize(("make", "call"), [(tiny_qwen, qwen_call), (tiny_flux, flux_call)], ids=["qwen", "flux"])
def test_a_batch_of_masks_is_each_sample_behind_its_own(make: Any, call: Any, tmp_path: Path) -> None:
    context = tiny_context(make(), call, tmp_path, protect_first=0, protect_last=0)
    student = GatedStudent(context.teacher, context.removable(), 0)
    batch = next(context.teacher.train.answered(2))
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, len(context.removable()), generator=generator).requires_grad_()
    together = student.loss([(batch, WHOLE)], masks)
    (gradient,) = torch.autograd.grad(together, [masks])
    alone, wanted = [], torch.zeros_like(masks)
    for row in range(2):
        alone.append(student.loss([(batch.take([row]), WHOLE)], masks[row]) / 2)
        wanted += torch.autograd.grad(alone[-1], [masks])[0]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match="3 masks for 2 samples"):
        student.loss([(batch, WHOLE)], torch.ones(3, len(context.removable())))


def test_groups_are_of_neighbours_of_one_stack(tmp_path: Path) -> None:
    blocks = [("a", i) for i in range(1, 8)] + [("b", i) for i in range(1, 4)]
    groups = groups_of(blocks)
    assert [len(group) for group in groups] == [3, 4, 3]
    assert [block for group in groups for block in group] == blocks
    context = tiny_context(tiny_flux(), flux_call, tmp_path, keep=0.85, protect_first=0, protect_last=0)
    own = groups_of(context.removable())
    quotas = quotas_of(context, own)
    assert 0 < sum(quotas) < sum(map(len, own))
    assert all(quota <= len(group) for quota, group in zip(quotas, own, strict=True))


# On a teacher


def idle(transformer: Any, blocks: tuple[int, ...]) -> Any:
    """Make some blocks hand on what they are given, and the others do more."""
    with torch.no_grad():
        for index, block in enumerate(transformer.transformer_blocks):
            for layer in (block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]):
                layer.weight.mul_(0 if index in blocks else 4)
                layer.bias.mul_(0)
    return transformer


@pytest.mark.parametrize("name", ["learned", "rarts"])
def test_blocks_that_do_nothing_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "checkpointed", contextlib.nullcontext)  # half the time
    monkeypatch.setattr(rarts, "GATE_RATE", 0.6)
    monkeypatch.setattr(learned, "LOGIT_RATE", 0.6)
    transformer = idle(tiny_qwen(5), (2,))
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    context = tiny_context(transformer, qwen_call, tmp_path, keep=0.9, search_steps=8, search_batch=2)
    found = choose(name, context)
    gone = {i for _, s in found.runs for i in range(s.first + 1, s.last + 1)}
    assert gone == {2}
    assert all(s.start == "first" for _, s in found.runs)  # the block before stays what it is
    assert found.teacher_forwards == {"learned": 3, "rarts": 12}[name] * 8 * 2
    assert all(torch.equal(value, before[key]) for key, value in transformer.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in transformer.parameters())


@pytest.mark.parametrize("name", ["learned", "rarts"])
@pytest.mark.parametrize("budget", [{"keep": 0.8}, {"speedup": 1.4}, {"fit_gb": 0.0008}], ids=str)
def test_budgets_are_met_by_both_stacks(name: str, budget: dict[str, float], tmp_path: Path) -> None:
    options = {"keep": None, **budget, "protect_first": 0, "protect_last": 0, "search_steps": 1, "search_batch": 2}
    context = tiny_context(tiny_flux(2, 3), flux_call, tmp_path, **options)
    flops = {s.name: (5,) * s.num_blocks for s in context.model.stacks}
    stacks = tuple(dataclasses.replace(s, block_flops=flops[s.name]) for s in context.model.stacks)
    model = dataclasses.replace(context.model, stacks=stacks, flops=40)
    context = dataclasses.replace(context, analysis=dataclasses.replace(context.analysis, model=model))
    if "fit_gb" in budget:
        size = model.params * model.bytes_per_param / 1e9 * 0.8
        context = dataclasses.replace(context, settings=context.settings.model_copy(update={"fit_gb": size}))
    found = choose(name, context)
    kind, value = context.settings.budget
    assert meets(found.predicted, kind, value)
    assert found.runs
    needed = context.needed_savings
    chosen = torch.tensor([0.0 if (stack, i) in gone_of(found) else 1.0 for stack, i in context.removable()])
    assert needed > 0
    assert excess(context, context.removable(), chosen).item() == 0
    assert excess(context, context.removable(), torch.ones(len(chosen))).item() > 0


def gone_of(plan: Any) -> set[tuple[str, int]]:
    return {(name, i) for name, s in plan.runs for i in range(s.first + 1, s.last + 1)}


@pytest.mark.parametrize("search", [Learned(), Rarts()], ids=["learned", "rarts"])
def test_a_budget_out_of_reach_is_found_before_training(search: Any, tmp_path: Path) -> None:
    context = tiny_context(tiny_qwen(5), qwen_call, tmp_path, keep=0.2)
    object.__setattr__(context, "open_teacher", None)  # it would be missed
    with pytest.raises(BudgetError, match="nearest feasible budget is --keep"):
        search.choose(context)


def test_open_gates_are_the_teacher_and_halves_share_no_prompt(tmp_path: Path) -> None:
    context = tiny_context(tiny_qwen(5), qwen_call, tmp_path)
    teacher = context.teacher
    student = GatedStudent(teacher, context.removable(), 0)
    batch = list(teacher.train.weighed(teacher.train.spread(), 3))
    assert float(student.loss(batch, torch.ones(2)).detach()) < 1e-10
    assert float(student.loss(batch, torch.zeros(2)).detach()) > 1e-4
    one, other = teacher.train.halves()
    assert len(one) + len(other) == len(teacher.train)
    prompts = [{teacher.train.marks[row].prompt for group in half.groups for row in group} for half in (one, other)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_samples_that_guidance_doubled_are_of_one_prompt(tmp_path: Path) -> None:
    context = tiny_context(tiny_qwen(4), qwen_call, tmp_path)
    path = tmp_path / "calibration" / "train-0000.safetensors"
    (tmp_path / "calibration" / "train-0001.safetensors").unlink()
    tensors, meta = read_tensors(path)
    write_tensors(path, tensors, {**meta, "prompts": ["a cat"]})  # its two samples are with and without the prompt
    with pytest.raises(ArtifactError, match="of one prompt and cannot be split"):
        context.teacher.train.halves()


def test_a_family_whose_blocks_cannot_be_gated_is_refused(tmp_path: Path) -> None:
    transformer = tiny_qwen(4)
    context = tiny_context(transformer, qwen_call, tmp_path)
    adapter = adapter_for(transformer)
    (stack,) = adapter.stacks
    odd = dataclasses.replace(adapter, stacks=(dataclasses.replace(stack, outputs=("text", "other")),))
    with pytest.raises(ModelError, match=r"take image, text and give text, other; a gate needs both alike"):
        GatedStudent(Teacher(transformer, odd, tmp_path), context.removable(), 0)


def test_no_gradient_of_a_weight_is_ever_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tiny_context(tiny_qwen(4), qwen_call, tmp_path, keep=0.8, search_steps=1, search_batch=2)
    total, largest = sum(p.numel() for p in context.teacher.transformer.parameters()), []
    plain = torch.autograd.grad

    def counted(loss: Tensor, parameters: list[Tensor], **options: Any) -> Any:
        found = plain(loss, parameters, **options)
        largest.append(sum(g.numel() for g in found if g is not None))
        return found

    monkeypatch.setattr(torch.autograd, "grad", counted)
    choose("rarts", context)
    assert 0 < max(largest) < 0.6 * total
    assert not any(p.requires_grad for p in context.teacher.transformer.parameters())
