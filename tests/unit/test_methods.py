"""Every method under equal budgets, on the tiny pipeline."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ppcl.cli import app
from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.config import load_config
from ppcl.errors import ConfigError
from ppcl.experiments import methods as module
from ppcl.experiments.methods import METHODS, budgets_named, compare_methods, methods_named, row_of
from ppcl.experiments.methods_text import Entry, verdict
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.criteria import CRITERIA
from ppcl.pruning.searches import SEARCHES
from ppcl.run import Run
from ppcl.run.fork import fork

CHOSEN = "ours,ours-depth,random,units-magnitude,zeros-wanda"
BUDGETS = [{"keep": 0.9}, {"speedup": 1.0}]  # no more: times of a tiny model are noise


@pytest.fixture(scope="module")
def open_run(tiny_model, prompts_file, small_config, tmp_path_factory):
    """A function that opens one run directory."""
    out = tmp_path_factory.mktemp("methods") / "run"
    settings = [
        "fit.width=[modulation,ffn]",
        "evaluate.teacher_seeds=1",
        "distill.local_steps=1",
        "distill.output_steps=2",
    ]

    def opened(*overrides, out=out):
        config = load_config([small_config], [*settings, *overrides])
        return Run(str(tiny_model), out, config, prompts_file, "ppcl compare tiny")

    return opened


@pytest.fixture(scope="module")
def compared(open_run, tmp_path_factory):
    """A run, its text, and where the table was written to."""
    run, table = open_run(), tmp_path_factory.mktemp("table") / "methods.md"
    run.through("fit")
    return run, compare_methods(run, methods_named(CHOSEN), BUDGETS, (0, 1), table), table


def test_all_methods_stand_in_the_table_of_methods():
    assert {method.criterion for method in METHODS.values()} - {None} == set(CRITERIA)
    assert {method.plan["mode"] for method in METHODS.values() if method.plan} == set(SEARCHES)
    assert list(methods_named("all")) == list(METHODS)


@pytest.mark.parametrize(("text", "message"), [("wandas", "unknown method"), ("ours,units-wnda", "units-wanda")])
def test_unknown_methods_name_the_nearest(text, message):
    with pytest.raises(ConfigError, match=message):
        methods_named(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search=optimall", "--methods: search=optimall: unknown search .did you mean 'optimal'"),
        ("units=wandaa", "--methods: units=wandaa: .*did you mean 'wanda'"),
        ("units=none.py:Own", "there is no file none.py"),
        ("search=json:Own", "json has no 'Own'"),
        ("units=json:loads", "has no method score"),
    ],
)
def test_methods_from_outside_are_loaded_at_once(text, message):
    with pytest.raises(ConfigError, match=message):
        methods_named(text)


def test_classes_of_one_name_are_two_methods(tmp_path):
    places = [tmp_path / name / "m.py" for name in "ab"]
    for path in places:
        path.parent.mkdir()
        path.write_text("class M:\n    def score(self, transformer, adapter, sites, batches, seed): ...\n")
    first, second = (f"units={path}:M" for path in places)
    found = methods_named(f"{first},{second},{first}")
    assert [method.criterion for method in found.values()] == [f"{path}:M" for path in places]
    assert re.fullmatch("units-m-py-M units-m-py-M-[0-9a-f]{6}", " ".join(found))


@pytest.mark.parametrize("text", ["", "keep", "keep=2", "keep=x", "fit_gb=1", "speedup=0.5", "keep=0.5,,"])
def test_bad_budgets(text):
    with pytest.raises(ConfigError, match=r"--budgets: got .*write them like keep=0.84"):
        budgets_named(text)


def test_methods_from_files_of_ones_own(open_run, compared, tmp_path):
    search, units = tmp_path / "last.py", tmp_path / "ones.py"
    search.write_text(
        "class Last:\n    def cost(self, context):\n        return 0\n\n"
        "    def choose(self, context):\n        return context.remove_in_order(context.removable()[::-1], 'first')\n"
    )
    units.write_text(
        "import torch\n\n\nclass Ones:\n    cost = 0.0\n\n"
        "    def score(self, transformer, adapter, sites, batches, seed):\n"
        "        return [torch.arange(site.units.count).double() for site in sites]\n"
    )
    found = methods_named(f"search={search}:Last, units={units}:Ones")
    assert list(found) == ["search-last-py-Last", "units-ones-py-Ones"]
    run = compared[0]
    row, cost = row_of(run, "mine", found["search-last-py-Last"], {"keep": 0.9}, 0)
    assert cost == 0
    assert [s.first for s in row.plan.stacks["transformer_blocks"] if s.is_run] == [3]
    row, _ = row_of(run, "units", found["units-ones-py-Ones"], {"keep": 0.95}, 0)
    parts = [part for s in row.plan.stacks["transformer_blocks"] for part in s.width.values()]
    assert parts
    assert row.fitted_by.config.fit.criterion == f"{units}:Ones"


def test_on_the_command_line_before_anything_is_written(tmp_path, tiny_model):
    arguments = ["compare", str(tiny_model), "--out", str(tmp_path / "run"), "--methods", "pth"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "path" in str(result.exception)


def test_every_method_meets_the_budget_or_says_why_not(compared):
    run, text, table = compared
    rows = json.loads((run.out / "compare" / "methods.json").read_text())["rows"]
    model = run.search_context().model
    assert len(rows) == len(BUDGETS) * len(CHOSEN.split(","))
    for row in rows:
        if row["why_not"]:
            assert row["why_not"] in text
            continue
        assert len(row["seeds"]) == 2
        for metrics in row["seeds"]:
            if row["budget"] == "keep-0.9":
                assert metrics["params"] * (1 - metrics["zeros"]) <= 0.9 * model.params + 100
    assert {row["method"] for row in rows if row["why_not"]} == {"zeros-wanda"}  # of the speed-up alone
    zeros = next(row for row in rows if row["method"] == "zeros-wanda" and not row["why_not"])
    assert all(metrics["zeros"] > 0.05 and metrics["params"] == model.params for metrics in zeros["seeds"])
    assert zeros["teacher_forwards"] > 0
    assert table.read_text() == text
    assert table.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_criteria_have_a_fit_stage_of_their_own_beside_the_same_states(compared):
    run, *_ = compared
    own = run.out / "fits" / "magnitude"
    first = next((run.out / "calibration").iterdir()).name
    assert (own / "calibration" / first).samefile(run.out / "calibration" / first)
    assert json.loads((own / "candidates.json").read_text())["criterion"] == "magnitude"
    assert json.loads((run.out / "candidates.json").read_text())["criterion"] != "magnitude"


def test_criteria_plan_with_the_times_of_the_first(open_run, compared, tmp_path):
    shutil.copytree(compared[0].out, tmp_path / "run")
    run = open_run(out=tmp_path / "run")
    first = {option.block: option.saved_time for option in times_of(run, "magnitude")}
    disturbed = [replace(option, saved_time=7) for option in times_of(run, "magnitude")]
    path = run.out / "fits" / "magnitude" / "candidates.json"
    save_artifact(replace(load_artifact(Candidates, path), width=tuple(disturbed)), path)
    assert {option.block: option.saved_time for option in times_of(run, "magnitude")} == first
    assert {option.block: option.saved_time for option in times_of(run, "random")} == first
    assert set(first.values()) != {7}


def times_of(run, criterion):
    return fork(run, criterion, module.UNITS).read(Candidates, "candidates.json").width


def test_what_is_done_is_kept(open_run, compared, monkeypatch):
    run, text, _ = compared

    def refuse(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(module, "choose", refuse)
    monkeypatch.setattr("ppcl.experiments.runner.Distiller", refuse)
    shutil.rmtree(run.out / "compare" / "keep-0.9" / "ours" / "seed-1" / "pictures")
    assert compare_methods(open_run(), methods_named(CHOSEN), BUDGETS, (0, 1)) == text


def test_other_calibration_states_replace_the_fit_of_a_criterion(open_run, compared, tmp_path):
    shutil.copytree(compared[0].out, tmp_path / "run")
    run = open_run(out=tmp_path / "run")
    ledger = json.loads((run.out / "stages.json").read_text())
    ledger["analyze"]["seconds"] = 12345.0
    (run.out / "stages.json").write_text(json.dumps(ledger))
    before = (run.out / "fits" / "magnitude" / "candidates.json").stat().st_mtime_ns
    twin = fork(run, "magnitude", module.UNITS)
    assert json.loads((twin.out / "stages.json").read_text())["analyze"]["seconds"] == 12345.0
    assert (twin.out / "candidates.json").stat().st_mtime_ns > before


def test_searches_that_draw_use_the_seed(compared):
    run, *_ = compared
    plans = [row_of(run, "random", METHODS["random"], {"keep": 0.7}, seed)[0].plan for seed in range(6)]
    assert len({tuple((s.first, s.last) for s in plan.stacks["transformer_blocks"]) for plan in plans}) > 1


def test_a_search_that_does_not_draw_is_asked_once_for_all_seeds(compared, monkeypatch):
    run, *_ = compared
    asked, choose = [], module.choose

    def count(name, context):
        asked.append((name, context.seed))
        return choose(name, context)

    monkeypatch.setattr(module, "choose", count)
    for name in ("position", "random"):
        plans = [row_of(run, name, METHODS[name], {"keep": 0.8}, seed)[0].plan for seed in (0, 1)]
        assert all(plan.mode == name for plan in plans)
    assert asked == [("position", 0), ("random", 0), ("random", 1)]


def test_more_zeros_than_weights_are_refused(compared):
    run, *_ = compared
    with pytest.raises(module.BudgetError, match="would have to be zero"):
        row_of(run, "zeros-wanda", METHODS["zeros-wanda"], {"keep": 0.01}, 0)


def test_zeros_that_do_not_go_with_how_a_run_trains_are_no_row(open_run, compared, monkeypatch, tmp_path):
    shutil.copytree(compared[0].out, tmp_path / "run")  # the rows of the others stay as they are
    run = open_run("distill.release_gradients=true", out=tmp_path / "run")
    with pytest.raises(ConfigError, match="sparsity holds all gradients together"):
        row_of(run, "zeros-wanda", METHODS["zeros-wanda"], {"keep": 0.9}, 0)
    monkeypatch.setattr(module, "paragraphs", lambda runner, entries, seeds: [entries[0].why_not])
    chosen = {"zeros-wanda": METHODS["zeros-wanda"]}
    assert "sparsity holds all gradients together" in compare_methods(run, chosen, [{"keep": 0.9}], (0,))


def test_the_verdict_is_computed():
    def entry(name, drop):
        return Entry("keep-0.5", name, name.upper(), "blocks", (), [{"average_drop": drop, "velocity_error": 1.0}])

    rows = [entry("a", 1.0), entry("ours", 2.0)]
    first = "Least drop: A; the default is number 2 of 2, cannot be told apart from it (1.00 behind; of one seed)"
    assert verdict(rows) == f"{first}. Not told apart from the first: OURS. Least velocity error: A."

    def seeds(name, *drops):
        return Entry("b", name, name.upper(), "", (), [{"average_drop": d, "velocity_error": 1.0} for d in drops])

    clear = verdict([seeds("a", 1.0, 1.0), seeds("ours", 2.0, 2.0)])
    assert "2 of 2, worse (1.00 behind; seeds 1.0 to 1.0). Not told apart from the first: none." in clear
    assert "cannot be told apart from it" in verdict([seeds("a", 0.5, 1.5), seeds("ours", 2, 2)])
    ours = Entry("b", "ours", "OURS", "", (), [{"average_drop": -1.0, "velocity_error": 0.5}])
    assert verdict([ours, rows[0]]) == (
        "Least drop: OURS, the default. Not told apart from the first: A. Least velocity error: OURS, the default."
    )
    silent = [Entry("b", name, name, "", (), [{"velocity_error": e}]) for name, e in (("a", 0.5), ("ours", 0.7))]
    assert verdict(silent).startswith("Least velocity error: a; the default is number 2 of 2, cannot be told apart")
    assert sorted([entry("a", 3.0), entry("b", None), entry("c", -1.0)], key=lambda e: e.order)[0].name == "c"
    assert verdict([Entry("keep-0.5", "a", "A", "blocks", why_not="no")]) == "No method has a plan."
