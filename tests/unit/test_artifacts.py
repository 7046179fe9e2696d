"""Artifacts survive the disk, and nothing else passes for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.common.artifacts import SCHEMA_VERSION, load_artifact, save_artifact
from ppcl.errors import ArtifactError
from ppcl.pruning.artifacts import Candidate, Candidates
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
            cka_by_stream={"image": ((1.0, None), (None, 0.5))},
            intervals=((0, 1),),
            probe_error={"image": (0.1, 0.2, 0.3)},
            ridge={"image": (1e-6, 1e-4, 1.0)},
            influence=(0.0, 0.5, 1.0),
            ffn_linearity={"image": (None, 0.5, 0.5)},
            text_linearity={"input": (None, 0.1)},
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
        "z_blocks": (Segment(0, 1, "mean", {"ffn": {"kind": "x", "size": [1, None]}}, 5, 7), Segment(2, 2)),
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
