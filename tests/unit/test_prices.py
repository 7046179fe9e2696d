"""Prices by a backward sweep, and exact costs by carried states, against whole passes of the hybrids."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import flux_call, qwen_call, random_substitutes, tiny_flux, tiny_qwen
from torch import Tensor, nn

from ppcl.analysis.backward import backward_sweep, random_signs, signs_of
from ppcl.analysis.findings import Findings
from ppcl.analysis.prices import Job, Jobs, Price, Prices, exact_costs, read_prices, velocity_norm
from ppcl.analysis.products import common_vectors
from ppcl.analysis.sweep import Batch, Course, forward_sweep
from ppcl.capture.store import StateStore
from ppcl.student.assembly import RunKey, patched
from ppcl.teacher.blocks import Place, ResidentBlocks
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import adapter_for

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"


def swept(transformer: nn.Module, arguments: list[dict[str, Any]], folder: Path, memory: float = 1e12) -> Course:
    """A course whose store holds all levels."""
    batches, first = [], 0
    for number, one in enumerate(arguments):
        answer = torch.zeros(len(one["hidden_states"]), 1)
        rows = tuple((number, row) for row in range(len(answer)))
        batches.append(Batch(number, "held-out", first, lambda a=one, v=answer: Call(a, v), rows))  # type: ignore[misc]
        first += len(answer)
    course = Course(ResidentBlocks(transformer), batches, StateStore(folder, "test", memory))
    for level in range(len(course.source.order)):
        course.store.hold(level)
    forward_sweep(course, [])
    return course


def costs_of_whole_passes(
    transformer: nn.Module, arguments: list[dict[str, Any]], replacements: dict[RunKey, nn.Module]
) -> dict[RunKey, float]:
    """Relative velocity error of each replacement alone."""
    adapter, found = adapter_for(transformer), {}
    with torch.no_grad():
        target = torch.cat([velocity(transformer, one) for one in arguments])
        for run, block in replacements.items():
            student = patched(transformer, adapter, run, block)
            moved = torch.cat([velocity(student, one) for one in arguments]) - target
            found[run] = (moved.norm() / target.norm()).item()
    return found


CASES: list[tuple[Any, list[dict[str, Any]], list[RunKey]]] = [
    (
        lambda: tiny_qwen(5),
        [qwen_call(3, padded=True), qwen_call(2, seed=4)],
        [(DUAL, 0, 1), (DUAL, 2, 4), (DUAL, 3, 3)],
    ),
    (
        lambda: tiny_flux(dual=2, single=3),
        [flux_call(2), flux_call(1, seed=4)],
        [(DUAL, 0, 1), (SINGLE, 0, 1), (SINGLE, 1, 2)],
    ),
]


@pytest.mark.parametrize(("memory", "limit"), [(1e12, 8e9), (0, 1)])
@pytest.mark.parametrize(("make", "arguments", "runs"), CASES)
def test_exact_costs_are_those_of_whole_passes(
    make: Any, arguments: list[dict[str, Any]], runs: list[RunKey], memory: float, limit: float, tmp_path: Path
) -> None:
    transformer = make()
    blocks = random_substitutes(transformer, adapter_for(transformer), runs)
    course = swept(transformer, arguments, tmp_path / "sweep", memory)
    jobs = {str(run): Job(run, lambda _, run=run: blocks[run]) for run in runs}  # type: ignore[misc]
    jobs["same"] = Job((DUAL, 1, 1), lambda block: block)
    found = exact_costs(course, jobs, tmp_path / "branches", "test", limit=limit)
    expected = costs_of_whole_passes(transformer, arguments, blocks)
    assert list(found) == list(jobs)
    assert found.pop("same").error < 1e-6
    for run in runs:
        assert found[str(run)].error == pytest.approx(expected[run], rel=1e-4)
    assert not (tmp_path / "branches").exists()


def nudged(block: nn.Module, size: float, seed: int) -> nn.Module:
    """A block whose weights are a little different."""
    changed, generator = copy.deepcopy(block), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(size * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return changed


@pytest.mark.parametrize(("make", "arguments", "runs"), CASES)
def test_prices_of_small_changes_are_their_costs_and_vectors_add_up(
    make: Any, arguments: list[dict[str, Any]], runs: list[RunKey], tmp_path: Path
) -> None:
    transformer = make()
    course, findings = swept(transformer, arguments, tmp_path / "sweep"), Findings(tmp_path / "findings")
    places = list(course.source.order)
    blocks = {place: getattr(transformer, place[0])[place[1]] for place in places}
    changed = {(*place, place[1]): nudged(block, 1e-3, n) for n, (place, block) in enumerate(blocks.items())}

    def jobs_at(place: Place, block: nn.Module) -> Jobs:
        assert block is blocks[place]
        return {str(place): Job((*place, place[1]), lambda _: changed[(*place, place[1])], {"index": place[1]})}

    vectors = 64  # of random signs: the estimate's spread is about 1 / sqrt(2 * vectors)
    backward_sweep(course, StateStore(tmp_path / "g", "test"), [Prices(course, jobs_at, findings)], vectors, seed=1)
    prices = read_prices(findings, places, velocity_norm(course))
    exact = costs_of_whole_passes(transformer, arguments, changed)
    states = sum(len(one["hidden_states"]) for one in arguments)
    for place in places:
        price = prices[str(place)]
        assert price.vector.shape == (vectors, states)
        assert price.note == {"run": [*place, place[1]], "index": place[1]}
        assert price.error == pytest.approx(exact[(*place, place[1])], rel=0.35)
    jobs = {str(place): Job((*place, place[1]), lambda _, place=place: changed[(*place, place[1])]) for place in places}
    for name, cost in exact_costs(course, jobs, tmp_path / "branches", "test", vectors, seed=1).items():
        difference = float((cost.vector - prices[name].vector).norm())
        assert difference < 0.05 * cost.error  # the same random vectors: what is left is not linear
    with torch.no_grad():
        whole = copy.deepcopy(transformer)
        for (stack, index, _), block in changed.items():
            getattr(whole, stack)[index] = block
        target = torch.cat([velocity(transformer, one) for one in arguments])
        moved = torch.cat([velocity(whole, one) for one in arguments]) - target
    together = float(sum(price.vector for price in prices.values()).norm())  # type: ignore[union-attr]
    assert together == pytest.approx(float(moved.norm() / target.norm()), rel=0.35)


def test_the_price_of_a_run_is_taken_where_it_ends(tmp_path: Path) -> None:
    """The products with the gradients of a run's change, against autograd through what follows it."""
    transformer, arguments = tiny_qwen(4), [qwen_call(2)]
    run = (DUAL, 1, 2)
    block = random_substitutes(transformer, adapter_for(transformer), [run])[run]
    course, findings = swept(transformer, arguments, tmp_path / "sweep"), Findings(tmp_path / "findings")

    def jobs_at(place: Place, _: nn.Module) -> Jobs:
        return {"run": Job(run, lambda _: block)} if place == (DUAL, 2) else {}

    backward_sweep(course, StateStore(tmp_path / "g", "test"), [Prices(course, jobs_at, findings)], 3, seed=2)
    (price,) = read_prices(findings, course.source.order, velocity_norm(course)).values()
    expected = directional(transformer, arguments[0], run, block, course, 3)
    assert torch.allclose(price.vector, expected, rtol=1e-3, atol=1e-6)


def directional(
    transformer: nn.Module, arguments: dict[str, Any], run: RunKey, block: nn.Module, course: Course, vectors: int
) -> Tensor:
    """The velocity's derivative in the direction of the run's change, times the sign vectors."""
    adapter, spec = adapter_for(transformer), course.source.stacks[run[0]]
    entries = course.entries(run[1], None)
    states, others = course.inputs(entries, course.batches[0], run[1])
    with torch.no_grad():
        changed = adapter.call(spec, block, states, others)
    after = course.read(run[2], course.batches[0])

    class Mixed(nn.Module):
        def __init__(self, share: Tensor) -> None:
            super().__init__()
            self.share = share

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return adapter.pack(spec, {s: after[s] + self.share * (changed[s] - after[s]) for s in after})

    shares = torch.zeros(len(arguments["hidden_states"]), 1, 1, requires_grad=True)
    answer = velocity(patched(transformer, adapter, run, Mixed(shares)), arguments)
    signs = random_signs(course.batches[0], answer, vectors, 2)
    rows = [torch.autograd.grad((sign * answer).sum(), shares, retain_graph=True)[0].flatten() for sign in signs]
    return torch.stack(rows).double() / (float(answer.double().norm()) * vectors**0.5)


# What vectors say of pairs


def test_vectors_tell_each_product_from_as_many_signs_as_both_have() -> None:
    """Few for what is priced, many for what is carried, of which the first are the same."""
    generator = torch.Generator().manual_seed(0)
    states, numbers, few, many = 6, 300, 4, 256
    moved = torch.randn(8, states, numbers, generator=generator, dtype=torch.float64)
    moved += 0.8 * torch.randn(states, numbers, generator=generator, dtype=torch.float64)
    moved *= torch.logspace(-2, 0, 8, dtype=torch.float64)[:, None, None]
    signs = torch.stack([signs_of(n, (numbers,), many, 0) for n in range(states)]).double()
    assert all(torch.equal(signs_of(n, (numbers,), few, 0).double(), signs[n, :few]) for n in range(states))
    seen = torch.einsum("skn,jsn->jks", signs, moved)
    carried = [n >= 4 for n in range(8)]
    prices = {
        str(n): Price({}, (row if is_carried else row[:few]) / (many if is_carried else few) ** 0.5)
        for n, (row, is_carried) in enumerate(zip(seen, carried, strict=True))
    }
    vectors = torch.cat([common_vectors(prices)[str(n)] for n in range(8)])
    sketched = torch.stack([prices[str(n)].vector[:few].flatten() for n in range(4)])
    assert torch.allclose(vectors[:4].norm(dim=1), sketched.norm(dim=1))  # lengths are those of the prices
    found, true = alike(vectors), alike(moved.flatten(1))
    limit = 4 / (many * states) ** 0.5
    assert (found[4:, 4:] - true[4:, 4:]).abs().max() < limit < (alike(sketched) - true[:4, :4]).abs().max()
    assert (found - true).abs().max() < 4 / (few * states) ** 0.5


def alike(rows: Tensor) -> Tensor:
    """Cosines of all pairs."""
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T
