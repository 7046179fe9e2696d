"""Artifacts survive the disk, and nothing else passes for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.common.artifacts import SCHEMA_VERSION, load_artifact, save_artifact
from ppcl.errors import ArtifactError
from ppcl.pruning.artifacts import Candidate, Candidates, WidthOption
from ppcl.student.plan import CompressionPlan, Prediction, Segment, identity_segments
from ppcl.teacher.model_info import ModelInfo, Stack

STACKS = (Stack("z_blocks", "num_z", 3, (5, 5, 5), (1, 1, 1)), Stack("a_blocks", "num_a", 2, (4, 4)))
MODEL = ModelInfo("Flux", "abc", 100, 0, 2, 7, STACKS)
ANALYSIS = Analysis(
    model=MODEL,
    stacks=(
        StackAnalysis(
            name="z_blocks",
            cka=((1.0, 0.5, 0.25), (None, 1.0, 0.5), (None, None, 1.0)),
            cka_by_stream={"image": ((1.0, None, 0.25), (None, 0.5, 0.5), (None, None, 1.0))},
            intervals=((0, 1),),
            probe_error={"image": (0.1, 0.2, 0.3)},
            ridge={"image": (1e-6, 1e-4, 1.0)},
            influence=(0.0, 0.5, 1.0),
            ffn_linearity={"image": (None, 0.5, 0.5)},
            text_linearity={"input": (None, 0.1, 0.2)},
        ),
        StackAnalysis(
            name="a_blocks",
            cka=((1.0, 0.5), (None, 1.0)),
            cka_by_stream={},
            intervals=(),
            probe_error={"image": (0.1, 0.2)},
            ridge={"image": (1e-6, 1e-4)},
            influence=(0.0, 0.5),
        ),
    ),
    num_states=4,
    num_tokens={"image": 64},
    seconds=1.5,
)
CANDIDATES = Candidates((Candidate("z_blocks", 0, 1, 0.5), Candidate("a_blocks", 0, 1, 0.25, "mean", 0.125)), 3, 2.0)
PLAN = CompressionPlan(
    model=MODEL,
    mode="optimal",
    budget={"keep": 0.5},
    stacks={
        "z_blocks": (Segment(0, 1, "mean", {"ffn": {"kind": "low_rank", "size": 1}}, 5, 7), Segment(2, 2)),
        "a_blocks": (Segment(0, 1, "last"),),
    },
    predicted=Prediction(90, 0.9, 1.25, 187, None),
)


@pytest.mark.parametrize("artifact", [ANALYSIS, CANDIDATES, PLAN], ids=["analysis", "candidates", "plan"])
def test_round_trip(tmp_path: Path, artifact: Any) -> None:
    path = tmp_path / "a.json"
    save_artifact(artifact, path)
    assert load_artifact(type(artifact), path) == artifact
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


def test_whole_numbers_become_floats_where_floats_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_artifact(CANDIDATES, path)
    path.write_text(path.read_text().replace('"seconds": 2.0', '"seconds": 2'))
    assert isinstance(load_artifact(Candidates, path).seconds, float)


def test_runs_keep_the_execution_order_on_disk(tmp_path: Path) -> None:
    """JSON sorts the stacks by name; execution order is the model's."""
    save_artifact(PLAN, tmp_path / "plan.json")
    for plan in (PLAN, load_artifact(CompressionPlan, tmp_path / "plan.json")):
        assert [(name, s.first, s.last) for name, s in plan.runs] == [("z_blocks", 0, 1), ("a_blocks", 0, 1)]


def test_what_runs_and_segments_say() -> None:
    assert Candidate("a", 2, 5, 0.1).removed == 3
    assert Segment(2, 3).is_run
    assert not Segment(2, 2).is_run
    assert identity_segments(2) == (Segment(0, 0), Segment(1, 1))


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, None, "1"])
def test_another_schema_version_is_refused(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "a.json"
    save_artifact(CANDIDATES, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    with pytest.raises(ArtifactError, match=f"has schema_version {version}, expected {SCHEMA_VERSION}; delete it"):
        load_artifact(Candidates, path)


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_artifact(CANDIDATES, tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="is not a valid CompressionPlan"):
        load_artifact(CompressionPlan, tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ArtifactError, match="schema_version None"):
        load_artifact(CompressionPlan, tmp_path / "a.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mode",), 3),
        (("mode",), None),
        (("budget",), [1]),
        (("budget", "keep"), "half"),
        (("model", "params"), 1.5),
        (("model", "params"), "100"),
        (("model", "stacks"), None),
        (("model", "stacks"), "text"),
        (("model", "stacks", 0), [1]),
        (("model", "stacks", 0, "block_params"), [1, "2"]),
        (("predicted", "error"), "none"),
        (("stacks", "z_blocks"), [{"first": 0}]),
        (("stacks", "z_blocks"), [{"first": 0, "last": 1, "typo": 2}]),
        (("stacks", "z_blocks"), {}),
        (("stacks", "z_blocks", 0), None),
    ],
    ids=str,
)
def test_wrong_types_are_refused(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    file = tmp_path / "plan.json"
    save_artifact(PLAN, file)
    data = json.loads(file.read_text())
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="is not a valid CompressionPlan") as caught:
        load_artifact(CompressionPlan, file)
    assert "\n" not in str(caught.value)


def test_an_analysis_from_before_the_draws_is_read(tmp_path: Path) -> None:
    save_artifact(ANALYSIS, tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    for stack in data["stacks"]:
        del stack["interval_draws"], stack["interval_stability"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert load_artifact(Analysis, tmp_path / "a.json") == ANALYSIS


def test_an_interval_has_two_ends(tmp_path: Path) -> None:
    save_artifact(ANALYSIS, tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    data["stacks"][0]["intervals"] = [[0, 1, 2]]
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="is not a valid Analysis"):
        load_artifact(Analysis, tmp_path / "a.json")


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    save_artifact(CANDIDATES, tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    del data["steps"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="steps"):
        load_artifact(Candidates, tmp_path / "a.json")


def changed(path: Path, where: tuple[Any, ...], value: Any) -> None:
    """Write a JSON file again with one value changed; None drops it."""
    data = json.loads(path.read_text())
    node = data
    for key in where[:-1]:
        node = node[key]
    if value is None:
        del node[where[-1]]
    else:
        node[where[-1]] = value
    path.write_text(json.dumps(data))


KEPT = {"kind": "narrow", "size": 2, "of": 4, "kept": "3", "rows": ["a"], "columns": ["b"]}
FIRST = {"first": 0, "last": 1, "start": "mean"}


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("stacks", "z_blocks", 1), None, "it ends with block 1 of 3"),
        (("stacks", "z_blocks", 0), None, "2-2 stands where block 0 is due"),
        (("stacks", "z_blocks"), [{"first": 2, "last": 2}, FIRST], "where block 0 is due"),
        (("stacks", "z_blocks"), [FIRST, FIRST, {"first": 2, "last": 2}], "where block 2 is due"),
        (("stacks", "z_blocks"), [FIRST, {"first": 2, "last": 3}], "it ends with block 3 of 3"),
        (("stacks", "z_blocks"), [FIRST, {"first": 1, "last": 2}], "where block 2 is due"),
        (("stacks", "z_blocks"), [{"first": 1, "last": 0}, {"first": 0, "last": 2}], "where block 0 is due"),
        (("stacks", "z_blocks"), [], "it ends with block -1 of 3"),
        (("stacks", "z_blocks", 0, "last"), 10**12, "less than"),
        (("stacks", "z_blocks", 0, "first"), -1, "greater than or equal to 0"),
        (("stacks", "z_blocks", 0, "start"), "end", "pattern"),
        (("stacks", "z_blocks", 0, "saved_params"), -5, "greater than"),
        (("stacks", "z_blocks", 0, "error"), float("nan"), "finite"),
        (("stacks", "z_blocks", 0, "sparsity"), 1.5, "less than or equal to 1"),
        (("stacks", "a_blocks"), None, "the model has"),
        (("stacks", "b_blocks"), [], "the model has"),
        (("predicted", "speedup"), float("inf"), "finite"),
        (("predicted", "param_ratio"), float("nan"), "finite"),
        (("predicted", "params"), -1, "greater than"),
        (("budget", "keep"), float("nan"), "finite"),
        (("model", "params"), 3, "in a model of 3"),
        (("model", "params"), 0, "without parameters"),
        (("model", "stacks", 0, "num_blocks"), 2, "2 blocks"),
        (("model", "stacks", 0, "num_blocks"), 10**12, "less than"),
        (("model", "stacks", 0, "block_params"), [5, 5], "3 blocks"),
        (("model", "stacks", 1, "name"), "z_blocks", "one name"),
        (("sparsity"), {"pattern": "2:4"}, "expected"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {"kind": "x", "size": 1}, "cannot be replaced by 'x'"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {"size": 1}, "cannot be replaced"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {"kind": "low_rank", "size": 10**12}, "has size"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {"kind": "low_rank", "size": -1}, "has size"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {"kind": "low_rank", "size": True}, "has size"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {**KEPT, "of": 10**12}, "has of"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {**KEPT, "kept": "f" * 10_000}, "which of 4 units"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {**KEPT, "kept": "7"}, "keeps 3 units of 4"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {**KEPT, "kept": "-1"}, "which of 4 units"),
        (("stacks", "z_blocks", 0, "width", "ffn"), {**KEPT, "rows": 3}, "has rows"),
    ],
    ids=str,
)
def test_a_plan_that_is_none_is_refused(tmp_path: Path, where: tuple[Any, ...], value: Any, says: str) -> None:
    path = tmp_path / "plan.json"
    save_artifact(PLAN, path)
    changed(path, (where,) if isinstance(where, str) else where, value)
    with pytest.raises(ArtifactError, match="is not a valid CompressionPlan") as caught:
        load_artifact(CompressionPlan, path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("stacks", 0, "probe_error", "image"), [0.1, float("nan"), 0.2]),
        (("stacks", 0, "probe_error", "image"), [0.1, 0.2]),
        (("stacks", 0, "probe_error", "image"), [0.1, -0.2, 0.3]),
        (("stacks", 0, "influence"), [0.1, float("inf"), 0.2]),
        (("stacks", 0, "influence"), []),
        (("stacks", 0, "cka", 1), [None, float("nan"), 0.5]),
        (("stacks", 0, "cka", 1), [None, 1.0]),
        (("stacks", 0, "cka", 2), None),
        (("stacks", 0, "intervals"), [[1, 0]]),
        (("stacks", 0, "intervals"), [[0, 3]]),
        (("stacks", 0, "intervals"), [[-1, 1]]),
        (("stacks", 1), None),
        (("stacks", 1, "name"), "z_blocks"),
        (("num_states"), -4),
        (("seconds"), float("nan")),
    ],
    ids=str,
)
def test_an_analysis_that_is_none_is_refused(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    path = tmp_path / "analysis.json"
    save_artifact(ANALYSIS, path)
    changed(path, (where,) if isinstance(where, str) else where, value)
    with pytest.raises(ArtifactError, match="is not a valid Analysis"):
        load_artifact(Analysis, path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("candidates", 0, "probe_error"), float("nan")),
        (("candidates", 0, "fitted_error"), -1.0),
        (("candidates", 0, "last"), 0),
        (("candidates", 0, "first"), 3),
        (("candidates", 0, "last"), 10**12),
        (("candidates", 0, "start"), "best"),
        (("candidates", 1), {"stack": "z_blocks", "first": 0, "last": 1, "probe_error": 0.5}),
        (("steps"), -1),
        (("criterion_forwards"), float("inf")),
    ],
    ids=str,
)
def test_candidates_that_are_none_are_refused(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    path = tmp_path / "candidates.json"
    save_artifact(CANDIDATES, path)
    changed(path, (where,) if isinstance(where, str) else where, value)
    with pytest.raises(ArtifactError, match="is not a valid Candidates"):
        load_artifact(Candidates, path)


def test_candidates_of_another_model_are_refused() -> None:
    CANDIDATES.check_blocks(MODEL)
    part = {"ffn": {"kind": "low_rank", "size": 1}}
    option = WidthOption("z_blocks", 0, "ffn", part, 4, 1, 0.1)
    replace(CANDIDATES, width=(option,)).check_blocks(MODEL)
    for other in (
        replace(CANDIDATES, candidates=(Candidate("b_blocks", 0, 1, 0.5),)),
        replace(CANDIDATES, candidates=(Candidate("a_blocks", 0, 2, 0.5),)),
        replace(CANDIDATES, width=(replace(option, block=3),)),
        replace(CANDIDATES, width=(replace(option, saved_params=6),)),
    ):
        with pytest.raises(ArtifactError, match="is of another model"):
            other.check_blocks(MODEL)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    wrong = replace(ANALYSIS, seconds=float("nan"))
    with pytest.raises(ArtifactError, match=r"would be no valid Analysis .*precision=fp32"):
        save_artifact(wrong, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
