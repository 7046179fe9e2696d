"""metrics.json against the JSON schema that ppcl ships, and what version 1 becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_file import comparison, evaluation, model, number, speed
from report_run import make_metrics, write_run

from ppcl.common.files import write_json
from ppcl.errors import ArtifactError
from ppcl.eval.markdown import report
from ppcl.eval.older_results import upgraded
from ppcl.eval.report import write_report
from ppcl.eval.results import Evaluation, load_evaluation, write_schema

jsonschema = pytest.importorskip("jsonschema")
SHIPPED = Path(__file__).resolve().parents[2] / "eval" / "schemas" / "metrics.schema.json"


def complete() -> dict[str, Any]:
    """Teacher and student with most of what an evaluation measures."""
    spread = {"fid": {"mean": 31.6, "std": 0.85, "values": [31.0, 32.2]}}
    teacher = model("teacher", {"fid": number(31.0, 30.0, 33.0)}, spread=spread, speed=[speed(20.5)])
    student = model("student", {"fid": number(36.4, 30.0, 33.0)}, 2_000_000, speed=[speed(10.25)])
    drop = number(2.12, 1.5, 3.0)
    row = comparison("student", "teacher", {"psnr": number(21.4, 20.0, 22.0)}, average_drop=drop, verdict="kept")
    return evaluation([teacher, student], [row], notes=["LPIPS is left out"], reference="real pictures")


def test_the_shipped_schema_is_that_of_the_code(tmp_path: Path) -> None:
    """Else write it again with write_schema."""
    write_schema(tmp_path / "now.json")
    shipped = json.loads(SHIPPED.read_text())
    assert shipped == json.loads((tmp_path / "now.json").read_text())
    jsonschema.Draft202012Validator.check_schema(shipped)


def test_a_finished_run_keeps_to_its_schema(finished_run: Path) -> None:
    """The real output of ``ppcl compress``: with times at two step counts and FLOPs."""
    metrics = json.loads((finished_run / "eval" / "metrics.json").read_text())
    shipped = json.loads(SHIPPED.read_text())
    jsonschema.validate(metrics, shipped)
    assert json.loads((finished_run / "eval" / "metrics.schema.json").read_text()) == shipped
    teacher, student = metrics["models"]
    rows = student["speed"]
    assert {row["num_inference_steps"] for row in rows if row["part"] == "picture"} == {1, 2}
    assert any(row["part"] == "transformer" for row in rows)
    assert [row["batch_size"] for row in rows] == [row["batch_size"] for row in teacher["speed"]]
    assert all(row["latency_p10_ms"] <= row["latency_ms"] <= row["latency_p90_ms"] for row in rows)
    assert 0 < student["costs"]["flops"] < teacher["costs"]["flops"]


def test_what_is_not_in_the_schema_is_refused(tmp_path: Path) -> None:
    shipped = json.loads(SHIPPED.read_text())
    jsonschema.validate(complete(), shipped)
    for wrong in ({**complete(), "more": 1}, {**complete(), "seed": "zero"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, shipped)
        write_json(tmp_path / "metrics.json", wrong)
        with pytest.raises(ArtifactError, match="1 entries do not fit"):
            load_evaluation(tmp_path / "metrics.json")


def test_report_md(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a cat"])
    write_json(run / "eval" / "metrics.json", complete())
    write_report(run)
    text = (run / "report.md").read_text()
    assert text == report(Evaluation.model_validate(complete())) + text[text.index("\n## Plan") :]
    assert "# student against teacher" in text
    assert "**kept.**" in text
    assert "| FID ↓ | 31.0 (30.0 to 33.0) ± 0.85 | 36.4 (30.0 to 33.0) |" in text
    assert "| pictures, 20 steps | 4 | 20.5 (19.5 to 21.5) | 10.2 (9.25 to 11.2) | 50.0 | 50.0 |" in text
    assert "> LPIPS is left out" in text
    assert "Share of 20 draws of half of the held-out prompts" in text
    assert "| transformer_blocks 8-10 | 40% | 55% | 65% |" in text
    (run / "eval" / "metrics.json").write_text("[")
    write_report(run)
    assert not (run / "report.md").exists()


def test_what_was_not_measured_is_a_dash() -> None:
    text = report(Evaluation.model_validate(complete()))
    assert "KID" not in text
    assert "| One picture, ms |" not in text  # measured for none
    assert "| Times as fast, transformer | 1 | 1.20 |" in text


def test_metrics_of_version_1_still_show() -> None:
    """A run's file of the time when runs had a schema of their own; and the other command's, which changed little."""
    result = Evaluation.model_validate(upgraded(make_metrics()))
    teacher, student = result.models
    assert (teacher.label, student.params) == ("teacher", 9_700_000)
    assert teacher.spread["fid"].values == [31.0, 32.2]
    (row,) = result.comparisons
    assert row.average_drop is not None
    assert row.average_drop.value == 2.12
    assert row.scale == {"psnr": 12.8, "velocity_error": 0.142}
    assert row.fidelity["velocity_error"].over == "states"
    assert upgraded({**complete(), "schema_version": 1})["schema_version"] == 2
    assert upgraded([1]) == [1]
