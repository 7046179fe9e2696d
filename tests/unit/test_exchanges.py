"""Plans by the error of all options together: against trying everything, and on what a sum of squares gets wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ppcl.analysis.artifacts import Analysis
from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.tensor_files import write_tensors
from ppcl.config import PlanConfig
from ppcl.errors import ArtifactError
from ppcl.pruning.artifacts import VECTORS, Candidate, Candidates, WidthOption, load_candidates
from ppcl.pruning.exchanges import JointErrors
from ppcl.pruning.knapsack import Edge, Route
from ppcl.pruning.planner import layout_of_runs, plan, select
from ppcl.pruning.searches import Context, choose
from ppcl.student.plan import CompressionPlan, Segment
from ppcl.student.prediction import SHARE, adding, bounded, predict, together, unbounded, with_short_vectors
from ppcl.teacher.model_info import ModelInfo, Stack

BLOCKS = 7
MODEL = ModelInfo("Tiny", "0", 700, 700, 4, 0, (Stack("a", "blocks", BLOCKS, (100,) * BLOCKS, (100,) * BLOCKS),))


def random_edges(seed: int, size: float = 1.0) -> list[Edge]:
    """Runs of two and three blocks and smaller modules in single ones, whose vectors have much in common."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(2, 3))
    edges = []
    spans = [(i, i + n) for n in (0, 0, 1, 2) for i in range(BLOCKS - n)]
    for first, last in spans:
        vector = size * (last - first + 0.4) * (generator.normal(size=(2, 3)) + 1.5 * common * generator.normal())
        cost = float((vector**2).sum()) * generator.uniform(0.9, 1.4)  # a vector underrates what is not small
        saved = 100.0 * (last - first) if last > first else generator.uniform(10, 60)
        segment = Segment(first, last, error=cost**0.5, vector=tuple(vector.ravel()))
        squares, vectors = adding([cost**0.5], [segment.vector])
        edges.append(Edge(first, last, saved, cost, "a", segment, float(squares[0]), tuple(vectors[0])))
    return edges


def paths(edges: list[Edge], most: int) -> Iterator[Route]:
    """All sets of at most so many edges that do not overlap."""
    for count in range(most + 1):
        for chosen in itertools.combinations(range(len(edges)), count):
            spans = sorted((edges[n].first, edges[n].last) for n in chosen)
            if all(a[1] < b[0] for a, b in itertools.pairwise(spans)):
                yield tuple(sorted(chosen, key=lambda n: edges[n].first))


def by_hand(edges: list[Edge], route: Route, counts: float = 1.0) -> float:
    """x^T G x, with measured squares on the diagonal; all of it before squares are bounded."""
    free = {n: edges[n].cost / (1 - edges[n].cost / 2) if edges[n].cost < 1 else 4 * edges[n].cost - 2 for n in route}
    total = sum(free.values())
    for a, b in itertools.permutations(route, 2):
        share = (free[a] / edges[a].cost * free[b] / edges[b].cost) ** 0.5
        total += counts * share * float(np.dot(edges[a].segment.vector, edges[b].segment.vector))
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_path_is_the_quadratic_form(seed: int) -> None:
    edges = random_edges(seed, 0.1)
    joint = JointErrors(edges)
    for route in itertools.islice(paths(edges, 4), 0, None, 97):
        free = by_hand(edges, route)
        assert joint.of(route) == pytest.approx(by_hand(edges, route, SHARE), abs=1e-9)
        segments = [edges[n].segment for n in route]
        errors = [s.error for s in segments if s.error is not None]
        error, vector = together(errors, [s.vector for s in segments])
        assert error**2 == pytest.approx(bounded(np.maximum(free, 0.0)), abs=1e-9)
        assert len(vector) == (6 if route else 0)


def test_what_two_options_are_together_adds_up_with_a_third() -> None:
    """Pieces that were put together count as their parts do, large errors too."""
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(4, 5)) * 0.2
    errors = [*(1.1 * np.linalg.norm(vectors, axis=1)[:3]), 1.3]
    rows = [tuple(row) for row in vectors]
    pair, other = together(errors[:2], rows[:2]), together(errors[2:], rows[2:])
    parts = together([pair[0], other[0]], [pair[1], other[1]])
    assert parts[0] == pytest.approx(together(errors, rows)[0])


def test_large_errors_add_up_to_less_and_single_ones_stay() -> None:
    squares = np.array([0.0, 1e-6, 0.3, 0.999, 1.001, 2.0, 9.0])
    np.testing.assert_allclose(bounded(unbounded(squares)), squares)
    assert (np.diff(unbounded(squares)) > 0).all()
    assert together([3.0], [(1.0,)])[0] == pytest.approx(3.0)
    assert together([0.01, 0.01], [(), ()])[0] == pytest.approx(0.01 * 2**0.5, rel=1e-4)
    many, sure = together([0.5] * 8, [()] * 8)[0], 0.5 * 8**0.5
    assert many < 0.85 * sure
    far = together([0.9] * 100, [(0.9,)] * 100)[0]
    assert (
        far > 1.4
    )  # further than an unrelated velocity of the teacher's length: what is so far off is only put in order


def test_exchanges_come_near_the_best_of_all() -> None:
    """From the cheapest by summed squares; where that is not the best, exchanges get most of the difference."""
    left = []
    for seed in range(12):
        edges = random_edges(seed)
        joint, wanted = JointErrors(edges), 180.0
        enough = [route for route in paths(edges, 5) if sum(edges[n].saved for n in route) >= wanted]
        start = min(enough, key=lambda route: sum(edges[n].cost for n in route))
        best, found = min(map(joint.of, enough)), joint.improved(start, wanted)
        assert found in enough or len(found) > 5
        assert joint.of(found) <= joint.of(start)
        if joint.of(start) > 1.02 * best:
            left.append((joint.of(found) - best) / (joint.of(start) - best))
    assert len(left) >= 5  # otherwise nothing was shown
    assert np.mean(left) < 0.1, left


def candidates_of(parallel: bool) -> Candidates:
    """Four pairs: the two cheapest push the velocity the same way, or not; the other two are a little dearer."""
    runs = [Candidate("a", i, i + 1, 1.0, "first", error) for i, error in ((0, 0.1), (2, 0.1), (4, 0.12))]
    vectors = {runs[0].name: np.array([[0.1, 0.0]]), runs[2].name: np.array([[0.0, 0.12]])}
    vectors[runs[1].name] = np.array([[0.1, 0.0]]) if parallel else np.array([[0.0, 0.1]])
    return Candidates(tuple(runs), 1, 0.0, vectors=vectors)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_plan_avoids_options_whose_errors_add_up(parallel: bool) -> None:
    analysis = Analysis(MODEL, (), 1, {}, 0.0)
    settings = PlanConfig(keep=5 / 7, protect_first=0, protect_last=0)
    chosen = plan(analysis, candidates_of(parallel), settings)
    firsts = [segment.first for segment in chosen.stacks["a"] if segment.is_run]
    assert (set(firsts) == {0, 2}) is not parallel
    assert 4 in firsts or not parallel
    squares = 0.1**2 + (0.12**2 if parallel else 0.1**2)
    assert chosen.predicted.error == pytest.approx(squares**0.5, rel=0.01)
    unknown = plan(analysis, replace(candidates_of(parallel), vectors={}), settings)
    assert {segment.first for _, segment in unknown.runs} == {0, 2}  # without vectors squares are summed


@pytest.mark.parametrize("parallel", [False, True])
def test_baselines_are_predicted_as_the_optimal_plan_is(parallel: bool) -> None:
    analysis, candidates = Analysis(MODEL, (), 1, {}, 0.0), candidates_of(parallel)
    settings = PlanConfig(mode="uniform", keep=3 / 7, protect_first=0, protect_last=0)
    runs = [("a", 0, 1), ("a", 2, 3)]
    error = predict(MODEL, layout_of_runs(MODEL, tuple(runs), candidates)).error
    assert error == pytest.approx((0.02 + (0.02 if parallel else 0)) ** 0.5, rel=0.02)
    chosen = plan(analysis, candidates, settings)
    known = {f"{stack}/{s.first}-{s.last}" for stack, s in chosen.runs} <= {c.name for c in candidates.candidates}
    assert (chosen.predicted.error is not None) is known


@pytest.mark.parametrize("parallel", [False, True])
def test_a_bundle_leaves_out_what_adds_up(parallel: bool, tmp_path: Path) -> None:
    """Its sizes are planned, and predicted, by the joint errors of the search, from what the plan's file says."""
    settings = PlanConfig(keep=4 / 7, protect_first=0, protect_last=0)
    context = Context(Analysis(MODEL, (), 1, {}, 0.0), candidates_of(parallel), settings)
    save_artifact(choose("optimal", context), tmp_path / "plan.json")
    whole = load_artifact(CompressionPlan, tmp_path / "plan.json")
    assert len(whole.runs) == 3
    size = select(whole, "keep", 5 / 7)
    assert ({segment.first for _, segment in size.runs} == {0, 2}) is not parallel
    for keep in (6 / 7, 5 / 7, 4 / 7):
        settings = settings.model_copy(update={"keep": keep})
        planned, selected = plan(context.analysis, context.candidates, settings), select(whole, "keep", keep)
        assert selected.predicted.error == pytest.approx(planned.predicted.error)
        assert len(selected.runs) == len(planned.runs)
    unrelated = replace(whole, stacks={"a": tuple(replace(s, vector=()) for s in whole.stacks["a"])})
    assert {segment.first for _, segment in select(unrelated, "keep", 5 / 7).runs} == {0, 2}


def test_smaller_modules_of_one_block_are_predicted_together() -> None:
    """Two of one block that push the velocity the same way cost more than their squares; a measured diagonal stays."""
    options = [WidthOption("a", 3, g, {g: {"kind": "low_rank", "size": 1}}, 20, 0, 0.1) for g in ("x", "y")]
    vectors = {option.name: np.array([[0.08, 0.0]]) for option in options}
    settings = PlanConfig(keep=1 - 40 / 700, protect_first=0, protect_last=0)
    analysis = Analysis(MODEL, (), 1, {}, 0.0)
    chosen = plan(analysis, Candidates((), 1, 0.0, tuple(options), vectors=vectors), settings)
    segment = chosen.stacks["a"][3]
    assert segment.width.keys() == {"x", "y"}
    assert (
        segment.error == pytest.approx(chosen.predicted.error) == pytest.approx((0.02 + 2 * 0.08**2) ** 0.5, rel=0.02)
    )


def test_short_vectors_tell_the_products_of_long_ones() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(3, 40)) * [[1e-3], [1.0], [1e3]]
    rows[1] += rows[0] * 500
    pieces = [Segment(i, i + 1, error=1.0, vector=tuple(row)) for i, row in zip((0, 2, 5), rows, strict=True)]
    short = with_short_vectors({"a": [pieces[0], pieces[1], Segment(4, 4), pieces[2]]})["a"]
    assert [len(segment.vector) for segment in short] == [1, 2, 0, 3]
    for a, b in itertools.combinations([0, 1, 3], 2):
        n = len(short[a].vector)
        exact = rows[min(a, 2)] @ rows[min(b, 2)]
        scale = np.linalg.norm(rows[min(a, 2)]) * np.linalg.norm(rows[min(b, 2)])
        assert np.dot(short[a].vector, short[b].vector[:n]) == pytest.approx(exact, abs=1e-6 * scale)


def test_vectors_are_read_with_the_candidates_and_their_absence_is_said(tmp_path: Path) -> None:
    import torch

    candidates = candidates_of(True)
    save_artifact(candidates, tmp_path / "candidates.json")
    assert "vectors" not in (tmp_path / "candidates.json").read_text()
    with pytest.raises(ArtifactError, match=r"prices.safetensors does not exist; run the fit stage again"):
        load_candidates(tmp_path)
    write_tensors(tmp_path / VECTORS, {name: torch.from_numpy(vector) for name, vector in candidates.vectors.items()})
    read = load_candidates(tmp_path)
    assert read == candidates
    assert read.vectors.keys() == candidates.vectors.keys()
    assert all((read.vectors[name] == vector).all() for name, vector in candidates.vectors.items())
