"""The command line without a model: start-up, sizes, budgets, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ppcl import cli
from ppcl.analysis.artifacts import Analysis
from ppcl.cli.options import Budget, Settings, open_rounds, resolve
from ppcl.common.artifacts import load_artifact
from ppcl.common.folders import lock_folder, remove_leftovers
from ppcl.config import PlanConfig, load_config, parse_size
from ppcl.errors import BudgetError, ConfigError, UserError
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import plan

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("what", ["import ppcl", "from ppcl.cli import main; main()"])
def test_start_up_is_light(what):
    code = (
        "import sys, time, json\n"
        "sys.argv = ['ppcl', '--help']\n"
        f"try:\n    exec({what!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'open_clip', 'matplotlib') if m in sys.modules]\n"
        "print(json.dumps([time.process_time(), heavy]))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    seconds, heavy = json.loads(result.stdout.splitlines()[-1])
    assert heavy == []
    assert seconds < 1
    if "main" in what:
        for command in ("compress", "demo", "capture", "analyze", "fit", "plan", "distill", "export", "report"):
            assert command in result.stdout


@pytest.mark.parametrize(("text", "gigabytes"), [("24GB", 24), ("24", 24), ("1.5 gb", 1.5), ("800MB", 0.8)])
def test_size(text, gigabytes):
    assert parse_size(text) == pytest.approx(gigabytes)


@pytest.mark.parametrize("text", ["24TB", "GB", "big", "", "2,4GB"])
def test_bad_size(text):
    with pytest.raises(ConfigError, match="write it like 24GB"):
        parse_size(text)


def test_a_budget_option_replaces_the_budget_of_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("plan: {keep: 0.5}\n")
    config = resolve("x/y", Settings([path]), Budget(speedup=1.5, mode="paper"))
    assert config.plan.budget == ("speedup", 1.5)
    assert config.plan.mode == "paper"


def test_a_budget_that_nobody_gave_is_said(monkeypatch, capsys):
    step = SimpleNamespace(run=SimpleNamespace(group=SimpleNamespace(size=1), config=load_config([], [])))
    monkeypatch.setattr("ppcl.run.open_rounds", lambda *_: [step])
    for budget, said in ((Budget(), "no budget was given: --keep 0.6\n"), (Budget(speedup=1.5), "")):
        list(open_rounds("x/y", Path("out"), Settings(), budget, None, None, None))
        assert capsys.readouterr().err == said


def test_two_budgets():
    with pytest.raises(ConfigError, match="give one budget"):
        resolve("x/y", Settings(), Budget(keep=0.5, speedup=1.5))
    with pytest.raises(ConfigError, match="keep and speedup are both set; give one budget"):
        resolve("x/y", Settings(overrides=["plan.keep=0.5", "plan.speedup=2"]), Budget())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distil.local_steps=3", "unknown key 'distil' (did you mean 'distill'?)"),
        ("distill.local_step=3", "unknown key 'distill.local_step' (did you mean 'local_steps'?)"),
        ("distill.local_steps=-1", "distill.local_steps = -1"),
        ("distill.local_steps=many", "distill.local_steps = 'many'"),
        ("plan.keep=1.5", "plan.keep = 1.5"),
        ("plan.keep=.nan", "plan.keep = nan"),
        ("plan.mode=optimum", "did you mean 'optimal'?"),
        ("fit.starts=[first, best]", "'first', 'middle', 'last' or 'mean'"),
        ("precision=fp8", "'auto', 'fp32' or 'bf16'"),
        ("evaluate.features=incepton", "unknown features (did you mean 'inception'?)"),
        ("plan=3", "plan = 3"),
        ("distill.local_steps", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("plan.mode=[", "the value is not valid YAML"),
    ],
)
def test_bad_override(override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"plan: {kep: 0.5}", "unknown key 'plan.kep' (did you mean 'keep'?)"),
        (b"- keep\n- 0.5\n", "must hold a mapping of sections, got list"),
        (b"keep", "must hold a mapping of sections, got str"),
        (b"plan: {keep: [", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
    ],
)
def test_bad_config_file(tmp_path, content, expected):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config([path], [])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_file_missing(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config([tmp_path / "c.yaml"], [])


def test_numbers_without_a_point():
    assert load_config([], ["fit.learning_rate=1e-4"]).fit.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("one\ntwo"), 2, "error: one two\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here\n"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, code, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "open_rounds", fail)
    monkeypatch.setattr(sys, "argv", ["ppcl", "compress", "x/y", "--out", "z"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    assert capsys.readouterr().err == says


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("bug")

    monkeypatch.setattr(cli, "open_rounds", fail)
    monkeypatch.setattr(sys, "argv", ["ppcl", "compress", "x/y", "--out", "z"])
    with pytest.raises(RuntimeError, match="bug"):
        cli.main()


@pytest.mark.parametrize("budget", [{"keep": 0.01}, {"speedup": 50.0}, {"fit_gb": 1e-6}])
@pytest.mark.parametrize("mode", ["optimal", "uniform"])
def test_the_nearest_feasible_budget_is_feasible(finished_run, budget, mode):
    analysis = load_artifact(Analysis, finished_run / "analysis.json")
    candidates = load_artifact(Candidates, finished_run / "candidates.json")
    with pytest.raises(BudgetError) as caught:
        plan(analysis, candidates, PlanConfig(mode=mode, **budget))
    option, value = str(caught.value).partition("nearest feasible budget is --")[2].split()[:2]
    number = parse_size(value) if option == "fit" else float(value)
    name = "fit_gb" if option == "fit" else option
    assert name in budget
    assert plan(analysis, candidates, PlanConfig(mode=mode, **{name: number})).runs


def test_leftovers_of_dead_attempts(tmp_path):
    (tmp_path / "eval").mkdir()
    gone = (".plan.json.tmp-12.ppcl", "eval/.0001.png.tmp-7.ppcl", ".tmpXGBOxV")
    kept = ("eval/.keep", ".lock", "plan.json", ".ssh.old-99/id_rsa", ".git/.x.tmp-1.ppcl", ".notes.tmp-1", "a.old-1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".x.tmp-1.ppcl").touch()
    run = tmp_path / "run"
    for name in (*gone, ".bundle.old-3.ppcl/x", *kept):
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).touch()
    (run / "link").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(run)
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == set(kept)
    assert not (run / ".bundle.old-3.ppcl").exists()
    assert list((run / "link").iterdir())


def test_one_process_a_folder(tmp_path):
    lock, again = lock_folder(tmp_path / "run"), lock_folder(tmp_path / "run")  # the same process may
    code = (
        "import sys; from pathlib import Path; from ppcl.common.folders import lock_folder; "
        "lock_folder(Path(sys.argv[1]))"
    )
    again.release()
    for _ in range(2):  # a refused one leaves no trace
        refused = python(code, str(tmp_path / "run"))
        assert refused.returncode == 1
        assert f"is in use by process {os.getpid()}; wait" in refused.stderr
    lock.release()
    assert python(code, str(tmp_path / "run")).returncode == 0


def test_other_weights_of_the_same_size_are_another_model(tmp_path):
    from ppcl.teacher.origin import weights_digest

    (tmp_path / "transformer").mkdir()
    weights = tmp_path / "transformer" / "model.safetensors"
    weights.write_bytes(b"0" * 200_000)
    before = weights_digest(str(tmp_path))
    assert weights_digest(str(tmp_path)) == before
    weights.write_bytes(b"0" * 199_999 + b"1")
    assert weights_digest(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("compare", ("--budgets", "keep=0.5"), "--budgets needs --methods"),
        ("compare", ("--methods", "ours", "--keep", "0.5"), "write --budgets keep=0.5"),
        ("export", ("--keep", "0.5", "--mode", "paper"), "--prompts and --mode are the run's own"),
        ("export", ("--keep", "0.5", "--set", "distill.batch_size=3"), "export\\.\\* and device count alone"),
        ("export", ("--keep", "0.5", "--set", "export.dtyp=float16"), "unknown key 'export.dtyp'"),
        ("export", ("--keep", "0.5", "--push-to-hub", "a b"), "a b"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, command, options, says):
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    arguments = [command, str(tmp_path / "run"), "--out", str(tmp_path / "other"), *options]
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


def test_the_size_of_a_bundle_is_exported_as_asked_and_pushed(tmp_path, monkeypatch):
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    (tmp_path / "run" / "stages.json").write_text('{"model": "emoji"}')
    made, pushed = [], []

    def export_size(*arguments):
        made.append(arguments)
        return SimpleNamespace(plan=SimpleNamespace(predicted=SimpleNamespace(params=1, param_ratio=0.5)))

    monkeypatch.setattr("ppcl.experiments.ladder.export_size", export_size)
    monkeypatch.setattr("ppcl.run.summary.describe_plan", lambda plan: "a plan")
    monkeypatch.setattr("ppcl.export.hub.push", lambda *arguments: pushed.append(arguments))
    monkeypatch.setattr("ppcl.export.hub.has_token", lambda: True)
    run, out = tmp_path / "run", tmp_path / "other"
    options = ["--keep", "0.7", "--set", "export.dtype=float16", "--push-to-hub", "u/n", "--private"]
    CliRunner().invoke(cli.app, ["export", str(run), "--out", str(out), *options], catch_exceptions=False)
    settings = load_config([], ["export.dtype=float16"]).export
    assert made == [(run, out, "keep", 0.7, "cpu", settings, None)]
    assert [arguments[:3] for arguments in pushed] == [(out, "u/n", True)]
