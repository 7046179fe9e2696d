"""The tables of times in the pages, and strips of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_run import write_run
from test_report_models import write_evaluation

from ppcl.common.files import read_json, write_json
from ppcl.eval.report import write_report
from ppcl.eval.report_models import write_models_report
from ppcl.eval.report_speed import speed_table


def row(latency: float, steps: int | None = 20, **changes: Any) -> dict[str, Any]:
    part = "picture" if steps else "transformer"
    times = {"latency_ms": latency, "latency_p10_ms": latency - 1, "latency_p90_ms": latency + 1, "runs": 3}
    return {"part": part, "num_inference_steps": steps, "batch_size": 4, "peak_memory_bytes": 5e7, **times, **changes}


def test_as_fast_is_what_was_timed_in_turn() -> None:
    """Not the quotient of the medians: the first model's come from another comparison, under another load."""
    shown = speed_table(["A <b>", "B"], [[row(40.0)], [row(60.0, times_as_fast=1.5)]])
    assert "<td>60.0 <small>59.0 to 61.0</small></td><td>1.50×</td>" in shown
    assert "pictures, 20 steps" in shown
    assert "A &lt;b&gt;, ms" in shown


def test_rows_of_different_work_are_not_put_side_by_side() -> None:
    assert speed_table(["A", "B"], [[row(40.0)], [row(60.0, steps=10)]]) == ""
    assert speed_table(["A", "B"], [[row(40.0)], None]) == ""
    assert speed_table(["A"], ["damaged"]) == ""


def test_run_page_has_the_times_and_flops(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a cat"])
    metrics = read_json(run / "eval" / "metrics.json")
    metrics["speed"] = {"teacher": [row(5.0, steps=None)], "student": [row(4.0, steps=None, times_as_fast=1.25)]}
    metrics["teacher"]["flops"], metrics["student"]["flops"] = 470_000_000, 300_000_000
    metrics["notes"] = ["LPIPS is left out: <why>"]
    write_json(run / "eval" / "metrics.json", metrics)
    page = write_report(run).read_text()
    assert "At several step counts and batch sizes" in page
    assert "<td>1.25×</td>" in page
    assert "FLOPs of a call for one prompt" in page
    assert "LPIPS is left out: &lt;why&gt;" in page


def test_models_page_has_times_and_strips_and_relative_time(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path, num_models=3)
    result = read_json(out / "metrics.json")
    for index, one in enumerate(result["models"]):
        one["speed"] = [row(5.0 + index, times_as_fast=1.2 if index else None)]
    blocks = [{"first": 0, "last": 0, "width": ["img_mod.1"]}, {"first": 1, "last": 3, "width": []}]
    result["models"][1]["blocks"] = {"transformer_blocks": blocks}
    write_json(out / "metrics.json", result)
    page = write_models_report(out).read_text()
    assert "% of model-0" in page
    assert 'href="#speed"' in page
    assert "one block instead of 1–3" in page
    assert "kept; narrower: img_mod.1" in page
    assert page.count('class="strip"') == 1


def test_models_page_without_either(tmp_path: Path) -> None:
    page = write_models_report(write_evaluation(tmp_path)).read_text()
    assert 'id="speed"' not in page
    assert 'id="blocks"' not in page
