"""compare, study, and the plans of equal size behind them, on the tiny pipeline."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.probes import chained_probe
from ppcl.capture.states import States
from ppcl.cli import app, parse_seeds
from ppcl.common.artifacts import save_artifact
from ppcl.common.tables import markdown_table, measured, number, spread
from ppcl.config import load_config
from ppcl.errors import ConfigError
from ppcl.eval.models import with_transformer
from ppcl.eval.scoring import reference_of
from ppcl.experiments import runner as runner_module
from ppcl.experiments import study as study_module
from ppcl.experiments.baselines import nearest_rung, plans_of_equal_size, removed_blocks, run_keys
from ppcl.experiments.compare import compare_plans, plan_rows
from ppcl.experiments.noise import cell
from ppcl.experiments.runner import RowRunner, claim, mean_scores
from ppcl.experiments.study import (
    VelocityMeter,
    contiguous_removals,
    scattered_removals,
    study,
    study_squares,
    without_blocks,
)
from ppcl.experiments.study_text import Comparison, contiguity_section, squares_section
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import uniform_ladder
from ppcl.run import Run
from ppcl.student.assembly import LinearRun, patched
from ppcl.teacher.calls import velocity

STACK = [("blocks", index) for index in range(1, 11)]


@pytest.fixture(scope="module")
def open_run(tiny_model, prompts_file, small_config, tmp_path_factory):
    """A function that opens one run directory with other settings."""
    out = tmp_path_factory.mktemp("compare") / "run"
    base = ["plan.keep=0.7", "fit.max_candidates=12", "evaluate.teacher_seeds=1"]

    def opened(*overrides, out=out):
        config = load_config([small_config], [*base, *overrides])
        return Run(str(tiny_model), out, config, prompts_file, "ppcl compare tiny")

    return opened


@pytest.fixture(scope="module")
def compared(open_run):
    """A run that was compared with two training seeds, and the Markdown text."""
    run = open_run()
    run.through("fit")
    return run, compare_plans(run, None, (0, 1))


@pytest.fixture(scope="module")
def studied(open_run, compared):
    """The study of the same run, with its text."""
    run = open_run()
    return run, study(run, run.out / "copy.md", draws=3, seeds=(0, 1))


def refuse(*args, **kwargs):
    raise AssertionError("this was done before")


# Formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0.0, "0"),
        (3.7e-15, "0"),
        (0.012345, "0.0123"),
        (1234.5, "1,234"),
        (-0.5, "-0.500"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_spread_and_table():
    assert spread([None, 2.0]) == "2.00"
    assert spread([1.0, 3.0]) == "2.00 ± 1.4"
    assert spread([None]) == "-"
    assert markdown_table(["", "x"], [["a", "1"]]) == "|  | x |\n| --- | ---: |\n| a | 1 |"


def test_parse_seeds():
    assert parse_seeds("0, 3") == (0, 3)
    for text in ("", "a", "1,1", "-1", "0,"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


def test_bad_seeds_on_the_command_line(tmp_path):
    result = CliRunner().invoke(app, ["study", "emoji", "--out", str(tmp_path / "run"), "--seeds", "x"])
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "run").exists()


# Plans of equal size


def test_nearest_rung_prefers_exact_then_smaller():
    ladder = [(), (("s", 1, 3),), (("s", 1, 5),)]
    assert removed_blocks(nearest_rung(ladder, 4)) == 4
    assert removed_blocks(nearest_rung(ladder, 3)) == 2
    assert nearest_rung(ladder, 1) == ()


def test_all_plans_remove_as_many_blocks(compared):
    run, _ = compared
    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    plans, notes = plans_of_equal_size(analysis, candidates, run.config.plan)
    counts = {mode: removed_blocks(run_keys(plan)) for mode, plan in plans.items()}
    assert counts["optimal"] == counts["uniform"] == counts["influence"] == 2
    assert ("paper" in notes) == (counts.get("paper") != 2)
    assert plans["uniform"].predicted.params == plans["optimal"].predicted.params
    assert run_keys(plans["uniform"]) in uniform_ladder(analysis.model, run.config.plan)


def test_a_criterion_without_that_size_is_noted(compared):
    run, _ = compared
    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    bare = Analysis(
        **{**vars(analysis), "stacks": tuple(type(s)(**{**vars(s), "intervals": ()}) for s in analysis.stacks)}
    )
    plans, notes = plans_of_equal_size(bare, candidates, run.config.plan)
    assert "paper" not in plans
    assert "left out" in notes["paper"]


# compare


def test_rows_are_trained_alike(compared):
    run, text = compared
    data = json.loads((run.out / "compare" / "table.json").read_text())
    rows = data["rows"]
    removed = {"uniform-removed", "influence-removed"}
    assert {"ours", "ours-undistilled", "uniform", "influence", *removed} <= set(rows)
    logs = {
        path.parent.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (run.out / "compare").glob("*/seed-0/log.jsonl")
    }
    steps = {name: [(row["stage"], row["step"]) for row in log] for name, log in logs.items()}
    assert set(steps) == set(rows) - {"ours-undistilled"}
    assert all(row == steps["ours"] for name, row in steps.items() if name not in removed)
    assert all(len(row) == len(steps["ours"]) for row in steps.values())
    for name in removed:  # nothing stands for the blocks, the rest is tuned in all steps
        assert {stage for stage, _ in steps[name]} == {"distill.output"}
        assert {s["start"] for s in rows[name]["plan"]["transformer_blocks"] if s["last"] > s["first"]} == {"first"}
    assert len(steps["ours"]) == run.config.distill.local_steps + run.config.distill.output_steps
    plain = rows["ours-undistilled"]["seeds"]
    assert len(plain) == 1  # a training seed makes no difference to it
    assert plain[0]["velocity_error"] == pytest.approx(plain[0]["velocity_error_before"], rel=1e-6)
    assert plain[0]["velocity_error_before"] == rows["ours"]["seeds"][0]["velocity_error_before"]
    first, second = rows["ours"]["seeds"]
    assert first["velocity_error"] != second["velocity_error"]
    assert "| ours |" in text
    assert "Average drop after training" in text


def test_with_smaller_modules_the_first_row_is_as_fast_as_the_plans_of_depth(open_run, compared, tmp_path):
    shutil.copytree(compared[0].out, tmp_path / "run")
    run = open_run("fit.width=[modulation,ffn]", "plan.keep=0.8", out=tmp_path / "run")
    run.run("fit")
    candidates = run.read(Candidates, "candidates.json")
    by_flops = [replace(option, saved_time=None) for option in candidates.width]  # of tiny modules the clock is noise
    save_artifact(replace(candidates, width=tuple(by_flops)), run.out / "candidates.json")
    rows = {row.name: row for row in plan_rows(run)[0]}
    depth, ours, size = (rows[name].plan for name in ("ours-depth", "ours", "ours-size"))
    assert depth.has_width is False
    assert ours.has_width
    assert ours.predicted.error < depth.predicted.error
    assert ours.predicted.speedup >= depth.predicted.speedup
    assert size.predicted.param_ratio <= depth.predicted.param_ratio
    assert rows["ours-undistilled"].plan == ours
    assert not rows["ours-depth-undistilled"].is_trained
    assert {rows[name].settings for name in ("ours", "ours-size", "ours-depth", "uniform")} == {rows["ours"].settings}


def test_every_number_of_one_seed_has_an_interval(compared):
    """In the row and in the table; the drop's is paired by prompt with the teacher's mean over seeds."""
    run, text = compared
    plain = json.loads((run.out / "compare" / "ours-undistilled" / "seed-0" / "metrics.json").read_text())
    assert set(plain["intervals"]) >= {"velocity_error", "fid", "kid", "clip_score", "retrieval_at_1", "average_drop"}
    for name, (low, high) in ((n, lim) for n, lim in plain["intervals"].items() if lim):
        assert low - 1e-9 <= plain[name] <= high + 1e-9, name
    line = next(line for line in text.splitlines() if line.startswith("| ours, undistilled"))
    assert measured([plain], "velocity_error") in line
    assert cell([plain], "clip_score") in line
    runner = RowRunner(run)
    scores = [seed["clip_score"] for seed in runner.teacher_scores]
    assert runner.captions["clip_score"].value == pytest.approx(np.mean(scores))


def test_students_are_drawn_with_several_picture_seeds(compared):
    run, text = compared
    rows = json.loads((run.out / "compare" / "table.json").read_text())["rows"]
    for name, row in rows.items():
        for training, metrics in enumerate(row["seeds"]):
            folder = run.out / "compare" / name / f"seed-{training}"
            assert sorted(p.name for p in (folder / "pictures").iterdir()) == ["seed-0", "seed-1", "seed-2"]
            each = metrics["picture_seeds"]
            drops = [one["average_drop"] for one in each]
            assert metrics["average_drop"] == pytest.approx(np.mean(drops), abs=1e-9)
            assert each[1]["fid"] is None  # drawn from the noise of the reference, as the teacher's
            items = json.loads((folder / "metrics.json").read_text())["items"]
            assert np.mean(items["average_drop"]) == pytest.approx(metrics["average_drop"], abs=1e-6)
            assert len(items["clip_score"]) == 4
    assert re.search(r"\| ours \|.* ± \S+ t ± \S+ p \(\S+ to \S+\)", text)
    assert "told apart" in text
    assert set((run.out / "compare" / "teacher" / "pictures").iterdir()) == {
        run.out / "compare" / "teacher" / "pictures" / f"seed-{seed}" for seed in range(3)
    }  # drawn once for all rows


def test_a_folder_of_one_picture_seed_is_drawn_on(open_run, compared, monkeypatch):
    """Students and pictures of an earlier comparison stay; the other seeds are drawn."""
    folder = compared[0].out / "compare" / "uniform" / "seed-0"
    metrics = json.loads((folder / "metrics.json").read_text())
    trained = json.loads((folder / "depends.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({"digest": trained["drawn"]}))  # not all seeds' scores
    for seed in (1, 2):
        shutil.rmtree(folder / "pictures" / f"seed-{seed}")
    first = (folder / "pictures" / "seed-0" / "0000.png").stat().st_mtime_ns
    monkeypatch.setattr(runner_module.Distiller, "run", refuse)
    assert compare_plans(open_run(), None, (0, 1)) == compared[1]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (folder / "pictures" / "seed-0" / "0000.png").stat().st_mtime_ns == first


def test_measured_writes_intervals_or_spread():
    one = {"a": 2.0, "intervals": {"a": [1.0, 3.0]}}
    assert measured([one], "a") == "2.00 (1.00 to 3.00)"
    assert measured([{"a": 2.0}], "a") == "2.00"
    assert measured([{"a": None, "intervals": {"a": None}}], "a") == "-"
    assert measured([one, {"a": 4.0}], "a") == "3.00 ± 1.4"


def test_the_teacher_has_a_spread(compared):
    run, text = compared
    teacher = json.loads((run.out / "compare" / "table.json").read_text())["teacher"]
    assert len(teacher["seeds"]) == 3  # although the config asks for one
    assert teacher["seeds"][1]["fid"] is None  # the reference is not compared with itself
    assert teacher["seeds"][0]["fid"] is not None
    assert sum(each["average_drop"] for each in teacher["seeds"]) == pytest.approx(0, abs=1e-9)
    assert re.search(r"\| teacher \|.*±", text)


def test_real_pictures_are_the_reference_where_there_are_some(open_run, compared, monkeypatch, tmp_path):
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def real_reference(_, extractor):
        return reference_of(extractor.image_features(pictures)), "real pictures"

    monkeypatch.setattr(runner_module, "real_reference", real_reference)
    pictures_of_teacher = Path("compare", "teacher", "pictures")
    run = open_run(out=tmp_path / "run")
    shutil.copytree(compared[0].out / pictures_of_teacher, run.out / pictures_of_teacher)
    drawn = {"drawn": RowRunner(run).drawn_by}
    (run.out / "compare" / "teacher" / "depends.json").write_text(json.dumps(drawn))
    teacher = RowRunner(run).summary()
    assert teacher["fid_reference"] == "real pictures"
    assert all(each["fid"] is not None for each in teacher["seeds"])
    own = json.loads((compared[0].out / "compare" / "table.json").read_text())["teacher"]
    assert teacher["seeds"][0]["clip_score"] == own["seeds"][0]["clip_score"]
    assert teacher["seeds"][0]["fid"] != own["seeds"][0]["fid"]


def test_a_second_call_only_reads(open_run, compared, monkeypatch, tmp_path):
    monkeypatch.setattr(runner_module, "Distiller", refuse)
    monkeypatch.setattr("ppcl.eval.generate.draw", refuse)
    assert compare_plans(open_run(), tmp_path / "table.md", (0, 1)) == compared[1]
    assert (tmp_path / "table.md").read_text() == compared[1]


def test_an_interrupted_row_ends_up_the_same(open_run, compared):
    run, text = compared
    folder = run.out / "compare" / "uniform" / "seed-1"
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "bundle")
    (folder / "log.jsonl").unlink()
    next(folder.glob("pictures/*/0001.png")).unlink()
    assert compare_plans(open_run(), None, (0, 1)) == text


def test_changed_training_replaces_trained_rows_alone(open_run, compared, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(compared[0].out, copy)
    run = open_run("distill.local_steps=2", out=copy)
    marks = {p: p.stat().st_mtime_ns for p in copy.glob("compare/*/seed-0/metrics.json")}
    compare_plans(run, None, (0,))
    kept = {p.parent.parent.name for p, mark in marks.items() if p.stat().st_mtime_ns == mark}
    assert kept == {"ours-undistilled"}


def test_claim_removes_what_depends_on_the_change(tmp_path):
    products = {"trained": ("bundle",), "evaluated": ("pictures",)}

    def fill():
        for name in ("bundle", "pictures"):
            (tmp_path / name).mkdir(exist_ok=True)

    claim(tmp_path, {"trained": "1", "evaluated": "1"}, products)
    fill()
    claim(tmp_path, {"trained": "1", "evaluated": "1"}, products)
    assert (tmp_path / "bundle").is_dir() and (tmp_path / "pictures").is_dir()
    claim(tmp_path, {"trained": "1", "evaluated": "2"}, products)
    assert (tmp_path / "bundle").is_dir() and not (tmp_path / "pictures").exists()
    fill()
    claim(tmp_path, {"trained": "2", "evaluated": "2"}, products)
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "pictures").exists()


def test_with_transformer_shares_the_rest(compared):
    run, _ = compared
    other = object.__new__(type(run.teacher.transformer))
    other.__dict__ = dict(run.teacher.transformer.__dict__)
    copied = with_transformer(run.teacher, other)
    assert copied.transformer is other and run.teacher.transformer is not other
    assert copied.vae is run.teacher.vae and copied.text_encoder is run.teacher.text_encoder


def test_mean_scores_skips_unknown():
    assert mean_scores([{"fid": None, "clip": 1.0}, {"fid": 2.0, "clip": 3.0}]) == {"fid": 2.0, "clip": 2.0}


def test_changed_upstream_settings_train_the_candidates_again(open_run, compared, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(compared[0].out, copy)
    run, log = open_run("capture.guidance_scale=1.0", out=copy), copy / "log.jsonl"
    before = (copy / "candidates.safetensors").read_bytes()
    rows = len(log.read_text().splitlines())
    for stage in ("capture", "analyze", "fit"):
        assert run.run(stage)
    assert (copy / "candidates.safetensors").read_bytes() != before
    fitted = [c for c in run.read(Candidates, "candidates.json").candidates if c.fitted_error is not None]
    assert len(log.read_text().splitlines()) == rows + len(fitted) * run.config.fit.steps


# study


def test_draws_are_what_they_say():
    together = contiguous_removals([STACK], 3, 100, seed=0)
    assert len(together) == len(set(together)) == 8  # all there are
    assert all(b[1] - a[1] == 1 for removal in together for a, b in pairwise(removal))
    apart = scattered_removals([STACK], 3, 20, seed=0)
    assert len(apart) == len(set(apart)) == 20
    assert all(b[1] - a[1] > 1 for removal in apart for a, b in pairwise(removal))
    assert apart == scattered_removals([STACK], 3, 20, seed=0) != scattered_removals([STACK], 3, 20, seed=1)
    assert scattered_removals([STACK], 6, 4, seed=0) == []  # ten blocks have no six without neighbours
    two = [[("a", 0), ("a", 1)], [("b", 0), ("b", 1)]]
    assert scattered_removals(two, 2, 9, seed=0) == [
        ((s, i), (t, j)) for s, i, t, j in [("a", 0, "b", 0), ("a", 0, "b", 1), ("a", 1, "b", 0), ("a", 1, "b", 1)]
    ]
    assert contiguous_removals(two, 2, 9, seed=0) == [(("a", 0), ("a", 1)), (("b", 0), ("b", 1))]


def test_without_blocks(compared):
    run, _ = compared
    transformer, adapter = run.teacher.transformer, run.adapter
    (spec,) = adapter.stacks
    probes = study_module.read_tensors(run.out / "analysis.safetensors")[0]
    batches = list(States(run.out / "calibration", "held-out").batches(4))
    meter = VelocityMeter(transformer, batches)
    assert meter.error(without_blocks(transformer, adapter, (), None)) == 0
    removal = tuple((spec.name, i) for i in (1, 2, 4))
    assert len(getattr(without_blocks(transformer, adapter, removal, None), spec.name)) == 3
    assert len(getattr(without_blocks(transformer, adapter, removal, probes), spec.name)) == 5
    maps = chained_probe(probes, (spec.name, 1, 2), list(spec.inputs), torch.device("cpu"))
    block = adapter.blocks(transformer, spec)[1]
    one = patched(transformer, adapter, (spec.name, 1, 2), LinearRun(adapter, spec, block, maps))
    same = without_blocks(transformer, adapter, removal[:2], probes)
    with torch.no_grad():
        torch.testing.assert_close(velocity(same, batches[0]), velocity(one, batches[0]))
    assert len(adapter.blocks(transformer, spec)) == 6


def test_comparison_knows_what_is_clear():
    assert Comparison("skipped", 2, [1.0, 1.1], [2.0, 2.1]).cheaper == "contiguous"
    assert Comparison("skipped", 2, [1.0, 1.1], [2.0, 2.1]).is_clear
    assert not Comparison("skipped", 2, [1.0, 3.0], [2.0, 2.1]).is_clear
    assert not Comparison("skipped", 2, [1.0], [2.0]).is_clear
    text = contiguity_section(
        [Comparison("skipped", n, [1.0, 1.1], [other, other + 0.1]) for n, other in ((2, 2.0), (3, 0.1))]
    )
    assert (
        "Blocks skipped: contiguous removal is cheaper in 1 of 2 sizes (clearly in 1; scattered removal clearly in 1)."
        in text
    )
    assert "too few blocks" in contiguity_section([])


def test_words_about_squares_follow_the_numbers():
    row = {"removed": 2, "runs": 2, "squares": 0.5, "sum": 0.7, "measured": 0.55}
    other = {"removed": 3, "runs": 3, "squares": 0.5, "sum": 0.8, "measured": 0.79}
    assert "better than the plain sum in 1 of 2 plans" in squares_section([row, other])
    assert "nothing can be said" in squares_section([{**row, "runs": 1}])


def test_single_fitted_runs_measure_what_the_fit_stage_measured(compared):
    run, _ = compared
    held_out = States(run.out / "calibration", "held-out")
    count = run.config.fit.eval_states
    rows = study_squares(run, VelocityMeter(run.teacher.transformer, list(held_out.batches(count, count))))
    single = [row for row in rows if row["runs"] == 1]
    assert single
    for row in single:
        assert row["measured"] == pytest.approx(row["squares"], rel=1e-4) == pytest.approx(row["sum"], rel=1e-4)


def test_study_text_and_data(studied):
    run, text = studied
    data = json.loads((run.out / "study" / "table.json").read_text())
    assert (run.out / "study" / "table.md").read_text() == text == (run.out / "copy.md").read_text()
    assert {(row["form"], row["size"]) for row in data["contiguity"]} == {("skipped", 2), ("probes", 2)}
    assert all(len(data["sequence"][name]) == 2 for name in ("sequential", "non-sequential"))
    assert data["planner"][0]["mode"] == "optimal"
    assert "Command: `ppcl compare tiny`" in text
    assert str(run.out.parent) not in text and str(Path(run.model).parent) not in text
    assert "cheaper in" in text


def test_a_second_study_only_reads(open_run, studied, monkeypatch):
    for name in ("Distiller", "study_contiguity", "study_squares", "study_planner"):
        monkeypatch.setattr(study_module, name, refuse)
    assert study(open_run(), None, draws=3, seeds=(0, 1)) == studied[1]
