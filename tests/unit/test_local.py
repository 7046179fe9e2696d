"""Local distillation: its gradients, and what it does not run or keep."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tiny_models import DUAL, SINGLE, flux_call, qwen_call, random_substitutes, tiny_flux, tiny_qwen
from torch import Tensor, nn

from ppcl.distill.local import last_block, local_backward, masks_of
from ppcl.student.assembly import RunKey
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries
from ppcl.training.losses import state_loss

CASES = {
    "apart": [(DUAL, 0, 1), (DUAL, 3, 4)],
    "overlapping": [(DUAL, 1, 2), (DUAL, 1, 4), (DUAL, 2, 3), (DUAL, 2, 4)],
    "adjacent": [(DUAL, 0, 2), (DUAL, 3, 4)],
    "single blocks": [(DUAL, 2, 2), (DUAL, 2, 3)],
}


def naive(
    teacher: nn.Module, call: dict[str, Any], substitutes: dict[RunKey, nn.Module], kind: str
) -> dict[RunKey, Tensor]:
    """Record everything, compute all losses, one backward pass."""
    adapter = adapter_for(teacher)
    calls, _ = record_boundaries(teacher, adapter, call)
    losses = {}
    for run, block in substitutes.items():
        start, end = calls[run[:2]], calls[run[0], run[2]]
        output = adapter.call(start.stack, block, start.inputs, start.arguments)
        losses[run] = state_loss(output, end.outputs, masks_of(end.stack, end.arguments, end.outputs), kind)
    torch.stack(list(losses.values())).sum().backward()
    return losses


def check(teacher: nn.Module, call: dict[str, Any], runs: list[RunKey], kind: str = "normalized") -> None:
    adapter = adapter_for(teacher)
    mine, theirs = random_substitutes(teacher, adapter, runs), random_substitutes(teacher, adapter, runs)
    losses = local_backward(teacher, adapter, call, mine, kind)
    expected = naive(teacher, call, theirs, kind)
    assert losses.keys() == expected.keys()
    for run in runs:
        assert losses[run] == pytest.approx(expected[run].item(), rel=1e-5)
        assert losses[run] > 1e-4
        for (name, a), (_, b) in zip(mine[run].named_parameters(), theirs[run].named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4), name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_one_big_backward(runs: list[RunKey]) -> None:
    check(tiny_qwen(6), qwen_call(padded=True), runs)


def test_gradients_across_two_stacks_and_with_the_papers_loss() -> None:
    check(tiny_flux(), flux_call(), [(DUAL, 1, 2), (SINGLE, 0, 1), (SINGLE, 1, 3)])
    check(tiny_qwen(4), qwen_call(), [(DUAL, 0, 1)], kind="direction")


def test_padding_has_no_say() -> None:
    """Padded text tokens carry any value: the loss and the gradients must not see them."""
    teacher, call, runs = tiny_qwen(5), qwen_call(padded=True), CASES["apart"]
    adapter = adapter_for(teacher)
    other = dict(call)
    mask = call["encoder_hidden_states_mask"]
    other["encoder_hidden_states"] = torch.where(mask[..., None], call["encoder_hidden_states"], torch.tensor(3.0))
    first, second = random_substitutes(teacher, adapter, runs), random_substitutes(teacher, adapter, runs)
    a, b = local_backward(teacher, adapter, call, first), local_backward(teacher, adapter, other, second)
    for run in runs:
        assert a[run] == pytest.approx(b[run], rel=1e-5)
        for mine, theirs in zip(first[run].parameters(), second[run].parameters(), strict=True):
            if mine.grad is not None:
                assert torch.allclose(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("runs", "executed"),
    [
        ([(DUAL, 0, 1)], [(DUAL, 0), (DUAL, 1)]),
        ([(SINGLE, 0, 1), (DUAL, 1, 2)], [(DUAL, 0), (DUAL, 1), (DUAL, 2), (SINGLE, 0), (SINGLE, 1)]),
    ],
    ids=["first stack", "both stacks"],
)
def test_blocks_after_the_last_run_do_not_run(runs: list[RunKey], executed: list[tuple[str, int]]) -> None:
    teacher = tiny_flux(dual=3, single=4)
    adapter = adapter_for(teacher)
    substitutes = random_substitutes(teacher, adapter, runs)
    seen: list[tuple[str, int]] = []
    for name in (DUAL, SINGLE):
        for index, block in enumerate(getattr(teacher, name)):
            block.register_forward_hook(lambda *_, key=(name, index): seen.append(key))
    local_backward(teacher, adapter, flux_call(), substitutes)
    assert seen == executed
    assert last_block(adapter, substitutes) == executed[-1]


class Saved:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: Tensor, owner: str) -> None:
        self.tensor, self.owner = tensor, owner


@pytest.mark.parametrize("runs", [CASES["apart"], CASES["overlapping"]], ids=["apart", "overlapping"])
def test_one_graph_lives_at_a_time(runs: list[RunKey]) -> None:
    teacher = tiny_qwen(6)
    adapter = adapter_for(teacher)
    substitutes = random_substitutes(teacher, adapter, runs)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    owners: list[str] = ["teacher"]
    left_over: list[int] = []

    def enter(name: str) -> None:
        left_over.append(len(alive))
        owners.append(name)

    for run, block in substitutes.items():
        block.register_forward_pre_hook(lambda *_, name=str(run): enter(name))

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor, owners[-1])
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        local_backward(teacher, adapter, qwen_call(), substitutes)
        assert left_over == [0] * len(runs)
        assert sorted(owners[1:]) == sorted(map(str, runs))
        assert len(alive) == 0
        # the check itself: all graphs live at once in the naive way
        left_over.clear()
        naive(teacher, qwen_call(), substitutes, "normalized")
        assert left_over[-1] > 0


def test_measuring_leaves_no_gradients() -> None:
    teacher = tiny_qwen(6)
    adapter = adapter_for(teacher)
    runs = CASES["overlapping"]
    substitutes = random_substitutes(teacher, adapter, runs)
    measured = local_backward(teacher, adapter, qwen_call(), substitutes, backward=False)
    assert all(p.grad is None for block in substitutes.values() for p in block.parameters())
    assert measured == pytest.approx(local_backward(teacher, adapter, qwen_call(), substitutes), rel=1e-6)


def test_gradients_add_up_over_steps() -> None:
    teacher = tiny_qwen(4)
    adapter = adapter_for(teacher)
    run = (DUAL, 1, 2)
    once, twice = random_substitutes(teacher, adapter, [run]), random_substitutes(teacher, adapter, [run])
    local_backward(teacher, adapter, qwen_call(), once)
    local_backward(teacher, adapter, qwen_call(), twice)
    local_backward(teacher, adapter, qwen_call(), twice)
    for a, b in zip(once[run].parameters(), twice[run].parameters(), strict=True):
        assert a.grad is None or torch.allclose(2 * a.grad, b.grad, atol=1e-6)
