"""Path search against exhaustive search, and on a real teacher."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_planner import analysis_of
from tiny_models import describe_alone, flux_call, qwen_call, tiny_flux, tiny_qwen, write_states

from ppcl.common.tensor_files import write_tensors
from ppcl.config import PlanConfig
from ppcl.errors import BudgetError
from ppcl.eval.velocity import state_errors
from ppcl.pruning.artifacts import Candidate, Candidates
from ppcl.pruning.knapsack import Edge, Route, layout_of
from ppcl.pruning.planner import plan as planned
from ppcl.pruning.searches import Context, choose
from ppcl.pruning.searches.graph import Graph, PathSearch, Widths
from ppcl.pruning.searches.path import build_graph
from ppcl.pruning.searches.teacher import Teacher
from ppcl.student.assembly import assemble_student
from ppcl.student.plan import Segment
from ppcl.teacher.families import adapter_for


def random_graph(blocks: int, seed: int, longest: int = 4, share: float = 0.4) -> Graph:
    generator = random.Random(seed)
    edges = [
        Edge(
            first,
            last,
            float(last - first),
            cost := generator.random() * (last - first),
            "a",
            Segment(first, last),
            cost,
        )
        for first in range(blocks)
        for last in range(first + 1, min(first + longest, blocks))
    ]
    edges += [
        Edge(i, i, 0.5, cost := generator.random() / 2, "a", Segment(i, i, width={"x": {}}), cost)
        for i in range(blocks)
    ]
    return Graph(blocks, edges, share * blocks)


def all_routes(graph: Graph, start: int = 0) -> Iterator[Route]:
    yield ()
    for number, edge in enumerate(graph.edges):
        if edge.first >= start:
            for rest in all_routes(graph, edge.last + 1):
                yield (number, *rest)


def enough(graph: Graph) -> list[Route]:
    return [route for route in all_routes(graph) if graph.saved(route) >= graph.needed]


class Truth:
    """Errors that do not add up: every pair of edges that are close to each other has one of its own."""

    def __init__(self, graph: Graph, seed: int, strength: float = 0.3) -> None:
        self.graph, self.seed, self.strength, self.asked = graph, seed, strength, 0

    def of(self, route: Route) -> float:
        pairs = [random.Random(f"{self.seed} {a} {b}").gauss(0, self.strength) for a, b in itertools.pairwise(route)]
        return self.graph.proxy(route) + sum(pairs)

    def __call__(self, routes: Sequence[Route]) -> list[float]:
        self.asked += len(routes)
        return [self.of(route) for route in routes]


@pytest.mark.parametrize("blocks", [4, 6, 8, 10])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_of_exhaustive_search_is_found(blocks: int, seed: int) -> None:
    graph = random_graph(blocks, seed, longest=3)
    truth = Truth(graph, seed)
    best = min(map(truth.of, enough(graph)))
    found = PathSearch(graph, truth, truth).run(must_keep={blocks // 2})
    assert found is not None
    assert graph.saved(found) >= graph.needed
    assert truth.of(found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_the_additive_proxy_alone_does_not_find_it(seed: int) -> None:
    graph = random_graph(10, seed, longest=3)
    truth = Truth(graph, seed)
    assert truth.of(graph.cheapest(1)[0]) > min(map(truth.of, enough(graph))) + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_fuzzy_step_keeps_the_cheapest(seed: int) -> None:
    graph = random_graph(7, seed)
    wanted = sorted(map(graph.proxy, enough(graph)))[:80]
    found = graph.cheapest(80)
    assert [graph.proxy(route) for route in found] == pytest.approx(wanted)
    assert all(graph.saved(route) >= graph.needed for route in found)
    assert graph.saved(graph.most()) == max(map(graph.saved, all_routes(graph)))


def test_kept_blocks_and_neighbours() -> None:
    graph = random_graph(8, 1)
    for route in graph.cheapest(20, graph.avoiding({3, 4})):
        assert not {3, 4} & {b for n in route for b in range(graph.edges[n].first, graph.edges[n].last + 1)}
    base = graph.cheapest(1)[0]
    near = graph.neighbours(base, 30)
    assert near
    assert all(len(set(base) - set(route)) <= 1 and route != base for route in near)
    assert all(graph.saved(route) >= graph.needed for route in near)


def test_each_step_measures_as_many_as_it_says() -> None:
    graph = random_graph(12, 0, longest=4)
    truth, branches = Truth(graph, 0), Truth(graph, 0)
    widths = Widths(rounds=2)
    PathSearch(graph, branches, truth, widths).run(priors=[graph.cheapest(1)[0]])
    assert 0 < truth.asked <= 4 * widths.reduced + 1
    assert 0 < branches.asked <= 4 * 2 * widths.fuzzy


def test_no_path_at_all() -> None:
    graph = Graph(4, [Edge(0, 1, 1.0, 0.1, "a", Segment(0, 1), 0.1)], 2.0)
    assert PathSearch(graph, Truth(graph, 0), Truth(graph, 0)).run() is None


# On a teacher


def tiny_context(transformer: Any, call: Any, folder: Path, fitted: bool = True, **settings: Any) -> Context:
    """A teacher with recorded states and random costs; its substitutes are the starts."""
    adapter, model = adapter_for(transformer), describe_alone(transformer)
    calls = [call(batch=2, seed=seed) for seed in (1, 2)]
    for split in ("train", "held-out"):
        write_states(folder / "calibration", split, calls, transformer)
    write_tensors(folder / "candidates.safetensors", {"none": torch.zeros(1)})
    generator = random.Random(0)
    found = [
        Candidate(s.name, first, last, generator.random(), "first", generator.random() if fitted else None)
        for s in model.stacks
        for first in range(s.num_blocks)
        for last in range(first + 1, min(first + 3, s.num_blocks))
    ]
    probes = {
        f"{s.name}/{i}/{stream}/{kind}": torch.zeros(32, 32) if kind == "weight" else torch.zeros(32)
        for s in adapter.stacks
        for i in range(20)
        for stream in s.inputs
        for kind in ("weight", "bias")
    }
    write_tensors(folder / "analysis.safetensors", probes)
    options = PlanConfig(**{"keep": 0.75, "search_states": 4, **settings})
    teacher = Teacher(transformer, adapter, folder)
    return Context(analysis_of(model, {}), Candidates(tuple(found), 0, 0.0), options, 0, lambda: teacher)


@pytest.mark.parametrize(("build", "call"), [(tiny_qwen, qwen_call), (tiny_flux, flux_call)], ids=["qwen", "flux"])
def test_the_true_error_is_that_of_the_student(build: Any, call: Any, tmp_path: Path) -> None:
    transformer = build(5) if build is tiny_qwen else build()
    context = tiny_context(transformer, call, tmp_path, protect_first=0, protect_last=0)
    found = choose("path", context)
    assert found.predicted.param_ratio <= 0.75
    assert found.teacher_forwards > 0
    graph, linear = build_graph(context)
    teacher, best = context.teacher, None
    assert not any(linear)
    for route in enough(graph):  # every path of the graph, built as a student
        layout = layout_of(context.model, [graph.edges[number] for number in route])
        made = SimpleNamespace(stacks=layout)
        pieces = [(graph.edges[n].stack, graph.edges[n].segment) for n in route]
        blocks = teacher.substitutes(context.model, pieces, [False] * len(pieces))
        keys = {(name, s.first, s.last): block for (name, s), block in zip(pieces, blocks, strict=True)}
        student = assemble_student(transformer, teacher.adapter, made, keys)
        error = state_errors(transformer, student, teacher.held_out.batches(2)).error.value
        best = min(best or error, error)
    assert found.predicted.error == pytest.approx(best, rel=1e-4)
    assert all(p.grad is None for p in transformer.parameters())


def test_runs_that_nobody_fitted_are_measured_by_their_probes(tmp_path: Path) -> None:
    transformer = tiny_qwen(5)
    context = tiny_context(transformer, qwen_call, tmp_path, fitted=False, keep=0.7)
    found = choose("path", context)
    assert found.runs
    best = min(  # zero probes: a run is left out
        state_errors(transformer, without(transformer, first, last), context.teacher.held_out.batches(4)).error.value
        for first, last in ((1, 3), (1, 2), (2, 3))
        if last - first == found.runs[0][1].last - found.runs[0][1].first
    )
    assert found.predicted.error == pytest.approx(best, rel=1e-4)


def without(transformer: Any, first: int, last: int) -> Any:
    from ppcl.student.assembly import with_blocks

    blocks = list(transformer.transformer_blocks)
    return with_blocks(transformer, {"transformer_blocks": [*blocks[:first], *blocks[last + 1 :]]})


def test_an_infeasible_budget_names_one_that_works(tmp_path: Path) -> None:
    transformer = tiny_qwen(5)
    with pytest.raises(BudgetError, match=r"no path plan gives 0.1 .* nearest feasible budget is --keep") as caught:
        choose("path", tiny_context(transformer, qwen_call, tmp_path, keep=0.1))
    nearest = float(str(caught.value).split("--keep ")[1].split()[0])
    context = tiny_context(transformer, qwen_call, tmp_path, keep=nearest)
    assert choose("path", context).predicted.param_ratio <= nearest


def test_the_search_is_no_worse_than_the_planner_on_its_states(tmp_path: Path) -> None:
    transformer = tiny_qwen(6)
    context = tiny_context(transformer, qwen_call, tmp_path, keep=0.75)
    chosen = choose("path", context)
    other = planned(context.analysis, context.candidates, context.settings)
    pieces = other.runs
    blocks = context.teacher.substitutes(context.model, pieces, [False] * len(pieces))
    (error,) = context.teacher.errors([list(zip(pieces, blocks, strict=True))], 4, 2, "test")
    assert chosen.predicted.error is not None
    assert chosen.predicted.error <= error**0.5 + 1e-6
