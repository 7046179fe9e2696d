"""The page of ``ppcl evaluate``: built from metrics.json and pictures alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_file import HOSTILE, model, number, speed, write_evaluation, write_noise

from ppcl.common.files import read_json, write_json
from ppcl.errors import ArtifactError
from ppcl.eval.report import rewrite, write_report
from ppcl.eval.report_numbers import speed_table
from ppcl.eval.results import Speed, load_evaluation


def times(latency: float, steps: int | None = 20, **changes: object) -> Speed:
    return Speed.model_validate(speed(latency, steps, **changes))


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    page = write_report(write_noise(tmp_path)).read_text(encoding="utf-8")
    assert "model-1 &amp; others." in page
    assert "few prompts" in page
    assert "31.2 <small>30.8 to 31.8</small>" in page
    assert page.count("<svg") == 2  # against size, against time
    assert page.count("<li class=pair>") == 4 + 2 + 2
    assert "ppcl evaluate &#39;a b&#39; &#39;a b&#39; --out DIR" in page
    assert HOSTILE not in page
    assert "https://" not in page.replace("http://www.w3.org", "")
    assert "Training" not in page  # of runs alone


def test_more_than_two_models_are_a_table_to_sort(tmp_path: Path) -> None:
    page = write_report(write_noise(tmp_path, num_models=3)).read_text(encoding="utf-8")
    assert "<th scope=col><button type=button>" in page
    assert '<td data-value="31.25">31.2 <small>30.8 to 31.8</small></td>' in page


def test_numbers_of_a_comparison_join_the_models(tmp_path: Path) -> None:
    result = load_evaluation(write_noise(tmp_path) / "metrics.json")
    first, second = map(result.numbers_of, result.models)
    assert {"psnr", "average_drop"}.isdisjoint(first)
    assert second["psnr"].value == 31.25
    assert second["average_drop"].value == 2.5


def test_one_model_alone(tmp_path: Path) -> None:
    page = write_report(write_noise(tmp_path, num_models=1)).read_text(encoding="utf-8")
    assert "<h1>model-0</h1>" in page
    assert "Least alike" not in page
    assert page.count("<li class=pair>") == 4


def test_without_pictures_or_with_a_damaged_one(tmp_path: Path) -> None:
    out = write_noise(tmp_path)
    (out / "pictures" / "model-1" / "seed-0" / "0002.png").write_bytes(b"x")
    assert write_report(out).read_text(encoding="utf-8").count("<li class=pair>") == 3 + 1 + 1
    for path in (out / "pictures" / "model-1").rglob("*.png"):
        path.unlink()
    assert "There are no pictures of all models" in write_report(out).read_text(encoding="utf-8")


def test_many_models_show_fewer_prompts(tmp_path: Path) -> None:
    page = write_report(write_noise(tmp_path, num_models=5, num_pictures=60, side=8)).read_text("utf-8")
    assert page.count("<li class=pair>") == 256 // 5 + 4 * (4 + 4)
    assert len(page) < 5_000_000


@pytest.mark.parametrize("content", [None, [], {"schema_version": 1}, {"schema_version": 2, "models": []}])
def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path, content: object) -> None:
    if content is not None:
        write_json(tmp_path / "metrics.json", content)
    with pytest.raises(ArtifactError):
        rewrite(tmp_path)


def test_as_fast_is_what_was_timed_in_turn() -> None:
    """Not the quotient of the medians: the first model's come from another comparison, under another load."""
    shown = speed_table(["A <b>", "B"], [[times(40.0)], [times(60.0, times_as_fast=1.5)]])
    assert "<td>60.0 <small>59.0 to 61.0</small></td><td>1.50×</td>" in shown
    assert "pictures, 20 steps" in shown
    assert "A &lt;b&gt;, ms" in shown


def test_rows_of_different_work_are_not_put_side_by_side() -> None:
    assert speed_table(["A", "B"], [[times(40.0)], [times(60.0, batch_size=8)]]) == ""
    assert "60.0 (10 steps)" in speed_table(["A", "B"], [[times(40.0)], [times(60.0, steps=10)]])  # made for so many
    assert speed_table(["A", "B"], [[times(40.0)], []]) == ""
    assert speed_table(["A"], [[]]) == ""


def test_times_strips_and_relative_time(tmp_path: Path) -> None:
    out = write_noise(tmp_path, num_models=3)
    result = read_json(out / "metrics.json")
    for index, entry in enumerate(result["models"]):
        entry["speed"] = [speed(5.0 + index, times_as_fast=1.2 if index else None)]
    blocks = [{"first": 0, "last": 0, "width": ["img_mod.1"]}, {"first": 1, "last": 3, "width": []}]
    result["models"][1]["blocks"] = {"transformer_blocks": blocks}
    write_json(out / "metrics.json", result)
    page = write_report(out).read_text()
    assert "% of model-0" in page
    assert "At several step counts" in page
    assert "one block instead of 1–3" in page
    assert "kept; narrower: img_mod.1" in page
    assert page.count('class="strip"') == 1


def test_a_page_without_either(tmp_path: Path) -> None:
    page = write_report(write_evaluation(tmp_path, [model("m", {"fid": number(3.0)})], [])).read_text()
    assert "At several step counts" not in page
    assert 'id="blocks"' not in page
