"""metrics.json of both commands against the JSON schemas that ppcl ships, and report.md of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_run import make_metrics, write_run

from ppcl.common.files import write_json
from ppcl.eval.report import write_report
from ppcl.eval.results import write_schema
from ppcl.eval.run_metrics import RunMetrics, run_report, write_run_report, write_run_schema

jsonschema = pytest.importorskip("jsonschema")
SHIPPED = Path(__file__).resolve().parents[2] / "eval" / "schemas"
WRITERS = {"evaluate": write_schema, "compress": write_run_schema}


def shipped(name: str) -> dict[str, Any]:
    return json.loads((SHIPPED / f"{name}.metrics.schema.json").read_text())


def complete() -> dict[str, Any]:
    """Metrics of a run with everything that the stage writes."""
    timing = {"part": "picture", "batch_size": 4, "num_inference_steps": 20, "latency_ms": 20.5, "latency_p10_ms": 20.0}
    timing |= {"latency_p90_ms": 23.0, "runs": 3, "warmup_runs": 1, "peak_memory_bytes": 5_000_000}
    metrics = make_metrics()
    for side in ("teacher", "student"):
        metrics[side] |= {"kid": 0.5, "latency_p10_ms": 1.0, "latency_p90_ms": 2.0, "flops": 470_000_000}
    metrics["fidelity"]["velocity_error_by_timestep"] = []
    limits = {"fid": [30.0, 33.0], "kid": None}
    return metrics | {
        "seed": 0,
        "notes": ["LPIPS is left out"],
        "memory_measure": "resident",
        "speed": {"teacher": [timing], "student": [{**timing, "latency_ms": 10.25, "peak_memory_bytes": None}]},
        "intervals": {
            "level": 0.95,
            "resamples": 2000,
            "teacher": limits,
            "student": limits,
            "fidelity": {"psnr": [20.0, 22.0]},
            "average_drop": [1.5, 3.0],
            "average_drop_per_metric": {"clip_score": [1.0, 2.0]},
            "fid_ratio": None,
        },
    }


@pytest.mark.parametrize("name", WRITERS)
def test_shipped_schemas_are_those_of_the_code(name: str, tmp_path: Path) -> None:
    """Else write them again with the function of this name."""
    WRITERS[name](tmp_path / "now.json")
    assert shipped(name) == json.loads((tmp_path / "now.json").read_text())
    jsonschema.Draft202012Validator.check_schema(shipped(name))


def test_a_finished_run_keeps_to_its_schema(finished_run: Path) -> None:
    """The real output of ``ppcl compress``: with times at two step counts and FLOPs."""
    metrics = json.loads((finished_run / "eval" / "metrics.json").read_text())
    jsonschema.validate(metrics, shipped("compress"))
    assert json.loads((finished_run / "eval" / "metrics.schema.json").read_text()) == shipped("compress")
    rows = metrics["speed"]["student"]
    assert {row["num_inference_steps"] for row in rows if row["part"] == "picture"} == {1, 2}
    assert any(row["part"] == "transformer" for row in rows)
    assert [row["batch_size"] for row in rows] == [row["batch_size"] for row in metrics["speed"]["teacher"]]
    assert all(row["latency_p10_ms"] <= row["latency_ms"] <= row["latency_p90_ms"] for row in rows)
    assert 0 < metrics["student"]["flops"] < metrics["teacher"]["flops"]


def test_what_is_not_in_the_schema_is_refused() -> None:
    jsonschema.validate(complete(), shipped("compress"))
    for wrong in ({**complete(), "more": 1}, {**complete(), "seed": "0"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, shipped("compress"))


def test_report_md_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a cat"])
    write_report(run)
    assert not (run / "report.md").exists()  # metrics without intervals: of an older version
    write_json(run / "eval" / "metrics.json", complete())
    write_report(run)
    text = (run / "report.md").read_text()
    assert text == run_report(complete()) + text[text.index("\n## Plan") :]
    assert (
        "**67.4% of the parameters, 1.45 times as fast (1.38 end to end), average drop 2.12 (1.50 to 3.00) %.**" in text
    )
    assert "| FID ↓ | 31.0 (30.0 to 33.0) | 36.4 (30.0 to 33.0) | ± 0.85 |" in text
    assert "| pictures, 20 steps | 4 | 20.5 (20.0 to 23.0) | 10.2 (20.0 to 23.0) | 5.00 | - |" in text
    assert "> LPIPS is left out" in text
    assert "## Plan" in text


def test_unknown_numbers_are_dashes() -> None:
    metrics = complete()
    for key in ("average_drop", "param_ratio", "speedup", "speedup_end_to_end", "fid_ratio"):
        metrics[key] = None
    for side in ("teacher", "student"):
        metrics[side] |= {"fid": None, "clip_score": None, "peak_memory_bytes": None, "flops": None}
    metrics["intervals"]["average_drop"] = None
    metrics["speed"] = {"teacher": [], "student": []}
    RunMetrics.model_validate(metrics)
    text = run_report(metrics)
    assert "Nothing was measured." in text
    assert "FID ↓" not in text
    assert "| peak memory (MB) | - | - |" in text
    assert "Speed and memory" not in text


def test_damaged_numbers_leave_no_report(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "eval" / "metrics.json").write_text("[")
    assert write_run_report(tmp_path) is None
    assert not (tmp_path / "report.md").exists()
