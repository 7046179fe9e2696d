"""One bundle, many sizes: the ladder and the export of a size, on the tiny pipeline."""

import json
import time

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from ppcl.capture.states import States
from ppcl.cli import app
from ppcl.config import load_config
from ppcl.errors import ArtifactError, BudgetError, ConfigError, ModelError, UserError
from ppcl.eval.report import write_report
from ppcl.eval.report_ladder import _reading
from ppcl.experiments.ladder import export_size, measure_ladder
from ppcl.pipelines import load_bundle
from ppcl.run import Run
from ppcl.teacher.calls import velocity
from ppcl.teacher.flops import count_params

SETTINGS = [
    "plan.keep=0.6",
    "fit.max_candidates=4",
    "fit.width=[modulation,ffn]",
    "distill.train=substitutes",
    "distill.alternating_steps=2",
    "evaluate.teacher_seeds=1",
]


@pytest.fixture(scope="module")
def run(tiny_model, prompts_file, small_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("ladder") / "run"
    return Run(str(tiny_model), out, load_config([small_config], SETTINGS), prompts_file, "ppcl ladder tiny")


@pytest.fixture(scope="module")
def text(run, tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "ladder.md"
    run.through("distill")
    written = measure_ladder(run, [0.9, 0.75, 0.6], table)
    assert table.read_text() == written
    return written


def test_every_rung_is_scored_at_its_size(run, text):
    data = json.loads((run.out / "compare" / "ladder.json").read_text())
    total = count_params(run.teacher.transformer)
    params = [rung["metrics"]["params"] for rung in data["rungs"]]
    assert params == sorted(params, reverse=True)
    assert all(count <= rung["keep"] * total for count, rung in zip(params, data["rungs"], strict=True))
    errors = [rung["metrics"]["velocity_error"] for rung in data["rungs"]]
    assert all(error > 0 for error in errors)
    assert "| keep 0.75 |" in text
    # a linear text network saves 7,296 at an error of 2e-4, a low rank (22 of 32) 2,432 at 1e-3: no plan needs it here
    assert "txt_mlp: one affine map in" in text


def test_what_is_measured_is_not_measured_again(run, text, monkeypatch):
    monkeypatch.setattr("ppcl.experiments.ladder.build_student", None)  # would be called
    again = measure_ladder(run, [0.9, 0.75, 0.6])
    assert again == text


def test_the_report_shows_the_sizes(run, text):
    html = (run.out / "report.html").read_text()
    assert 'id="ladder"' in html
    assert 'href="#ladder"' in html
    assert all(f"<td>keep {keep}" in html or f">keep {keep}<" in html for keep in ("0.9", "0.75", "0.6"))
    assert "One teacher seed differs from the mean" in html
    ladder = run.out / "compare" / "ladder.json"
    kept = ladder.read_bytes()
    ladder.unlink()
    write_report(run.out)
    assert 'id="ladder"' not in (run.out / "report.html").read_text()
    ladder.write_bytes(kept)


@pytest.mark.parametrize(
    ("drops", "noise", "says"),
    [
        ([0.0, 1.0, 2.0], 0.1, "no smaller size scores better"),
        ([0.1, 0.0, 2.0], 0.1, "within twice that"),
        ([1.0, 0.0, 2.0], 0.1, "more than noise explains"),
        ([1.0, None], 0.1, "cannot be judged"),
    ],
)
def test_what_the_report_says_about_order(drops, noise, says):
    assert says in _reading(drops, noise)


def test_a_size_is_exported_without_training(run, text, tmp_path):
    result = CliRunner().invoke(app, ["export", str(run.out), "--keep", "0.75", "--out", str(tmp_path / "p")])
    assert result.exit_code == 0, result.output
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "p")
    data = json.loads((run.out / "compare" / "ladder.json").read_text())
    assert count_params(pipeline.transformer) == data["rungs"][1]["metrics"]["params"]
    with pytest.raises(ArtifactError, match="already there"):
        export_size(run.out, tmp_path / "p", "keep", 0.9)


def test_a_loaded_bundle_changes_its_size_at_once(run, text, tmp_path):
    data = json.loads((run.out / "compare" / "ladder.json").read_text())
    pipeline = load_bundle(run.out, keep=0.75)
    transformer = pipeline.transformer
    assert count_params(transformer) == data["rungs"][1]["metrics"]["params"]
    began = time.perf_counter()
    transformer.select(keep=0.6)
    assert time.perf_counter() - began < 2
    assert count_params(transformer) == data["rungs"][2]["metrics"]["params"]
    states = next(States(run.out / "calibration", "held-out").batches(4))
    for keep in (0.9, 0.6):
        transformer.select(keep=keep)
        export_size(run.out, tmp_path / f"{keep}", "keep", keep)
        fresh = DiffusionPipeline.from_pretrained(tmp_path / f"{keep}").transformer
        with torch.no_grad():
            torch.testing.assert_close(velocity(transformer, states), velocity(fresh, states), atol=1e-5, rtol=1e-5)
        assert dict(transformer.config)["pruning"] == dict(fresh.config).get("pruning", {})
    with torch.no_grad():
        assert transformer.select(active=()) == ()
        torch.testing.assert_close(velocity(transformer, states), velocity(run.teacher.transformer, states))
    (name,) = transformer.select(active=transformer.plugboard.names[:1])
    assert name in transformer.plugboard.names


def test_a_choice_that_makes_no_sense_is_refused(run, text, tmp_path):
    transformer = load_bundle(run.out).transformer
    assert transformer.plugboard.active == transformer.plugboard.names
    with pytest.raises(UserError, match="one of keep, speedup, fit_gb and active, got 2"):
        transformer.select(keep=0.8, speedup=1.1)
    with pytest.raises(UserError, match="no substitute 'x'"):
        transformer.select(active=["x"])
    with pytest.raises(ArtifactError, match="has no bundle"):
        load_bundle(tmp_path)
    export_size(run.out, tmp_path / "one", "keep", 0.6)
    with pytest.raises(ModelError, match="has one size"):
        DiffusionPipeline.from_pretrained(tmp_path / "one").transformer.select(keep=0.9)


def test_what_a_bundle_cannot_give_is_said(run, text, tmp_path):
    with pytest.raises(BudgetError, match="all of them put in it is --keep 0"):
        export_size(run.out, tmp_path / "p", "keep", 0.1)
    with pytest.raises(ArtifactError, match="has no bundle"):
        export_size(tmp_path, tmp_path / "p", "keep", 0.9)
    for arguments in (["--keep", "0.8", "--speedup", "1.1"], []):
        result = CliRunner().invoke(app, ["export", str(run.out), "--out", str(tmp_path / "p"), *arguments])
        assert isinstance(result.exception, ConfigError)
    for keeps in ("", "x", "1.2", "0"):
        result = CliRunner().invoke(app, ["ladder", "emoji", "--out", str(tmp_path / "p"), "--keeps", keeps])
        assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "p").exists()
