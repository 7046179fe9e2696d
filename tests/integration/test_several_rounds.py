"""`ppcl compress --rounds 2`: killed in both rounds it ends as the undisturbed one, held to the first teacher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import JOURNAL, attempt, leftovers, stable

from ppcl.config import RunConfig, load_config
from ppcl.errors import ArtifactError
from ppcl.eval.models import sources
from ppcl.run import rounds
from ppcl.run.folder import RunFolder
from ppcl.run.stages import STAGES
from ppcl.student.plan import CompressionPlan, Prediction

ROOT = Path(__file__).resolve().parents[2]
# stage and event, one kill after the other: what is done by then has none, so the second of a stage is in round 2
KILLS = {
    "few": (("distill", 5), ("capture", 5), ("evaluate", 6)),
    "many": (("distill", 5), ("export", 4), ("capture", 5), ("analyze", 4), ("distill", 6), ("evaluate", 6)),
}
Refuses = Callable[..., str]


def act(folder: Path, number: str, *options: str) -> None:
    """Make ``folder/undisturbed`` and ``folder/killed``; print the exit codes. Runs as a script."""
    import open_clip  # noqa: F401 - imported once, before the forks
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel  # noqa: F401

    import ppcl.run.evaluation  # noqa: F401

    torch.set_num_threads(1)
    command, output = ["compress", *options, "--out"], str(folder / "output.txt")
    codes = [attempt([*command, str(folder / "undisturbed")], output)]
    codes += [attempt([*command, str(folder / "killed")], output, kill=(stage, "any", n)) for stage, n in KILLS[number]]
    print(json.dumps([*codes, attempt([*command, str(folder / "killed")], output)]))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("few", "many")])
def runs(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    prompts_file: Path,
    small_config: Path,
    made_once: Callable[..., Path],
) -> Path:
    kills = KILLS[request.param]
    if sys.platform != "linux":
        pytest.skip("forks processes that have imported torch")
    options = (tiny_model, "--config", small_config, "--prompts", prompts_file, "--keep", 0.6, "--rounds", 2)
    more = ("--set", "device=cpu", "--set", "evaluate.num_prompts=2")  # no smaller modules: those are timed

    def make(folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [str(word) for word in (sys.executable, __file__, folder, request.param, *options, *more)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        output = (folder / "output.txt").read_text()[-3000:] if (folder / "output.txt").exists() else ""
        assert result.returncode == 0, result.stderr + output
        assert json.loads(result.stdout.splitlines()[-1]) == [0, *[-signal.SIGKILL] * len(kills), 0], output

    return made_once(f"rounds-{request.param}", make)


def test_kills_in_both_rounds_change_no_bit(runs: Path) -> None:
    assert leftovers(runs / "killed") == []
    trees = [{str(p.relative_to(runs / run)) for p in (runs / run).rglob("*") if p.is_file()} for run in KINDS]
    assert trees[0] == trees[1]
    assert {"round-1/bundle/tuned.safetensors", "plan.json", "bundle/tuned.safetensors"} < trees[0]
    for name in sorted(trees[0]):
        first, second = (runs / run / name for run in KINDS)
        if name.removeprefix("round-1/") in JOURNAL:
            continue
        if name.endswith(("analysis.json", "candidates.json", "metrics.json")):
            assert stable(json.loads(first.read_text())) == stable(json.loads(second.read_text())), name
        else:
            assert first.read_bytes() == second.read_bytes(), name


KINDS = ("undisturbed", "killed")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_last_round_is_held_to_the_first_teacher(runs: Path, tiny_model: Path) -> None:
    """Its states are the first round's, whose answers are the teacher's; so are pictures, shares and numbers."""
    run, first = runs / "killed", runs / "killed" / "round-1"
    states = sorted(path.name for path in (first / "calibration").iterdir())
    assert states == sorted(path.name for path in (run / "calibration").iterdir())
    assert all((first / "calibration" / n).read_bytes() == (run / "calibration" / n).read_bytes() for n in states)
    plans = [read(folder / "plan.json") for folder in (first, run)]
    whole = plans[0]["model"]["params"]
    assert plans[0]["budget"]["keep"] == pytest.approx(0.6**0.5)
    assert plans[1]["model"]["params"] == plans[0]["predicted"]["params"]
    assert plans[1]["model"]["first_params"] == whole
    left = plans[1]["predicted"]["params"]
    assert 0.4 * whole < left <= 0.6 * whole
    models = read(run / "eval" / "metrics.json")["models"]
    assert [model["params"] for model in models] == [whole, left]
    assert models[0]["model"] == "model"
    record = read(run / "pipeline" / "transformer" / "config.json")["_ppcl"]
    assert (record["source_model"], record["source_params"], len(record["rounds"])) == ("model", whole, 1)
    spans = [entry if isinstance(entry, list) else [entry] * 2 for entry in record["kept_blocks"]["transformer_blocks"]]
    assert [i for first, last in spans for i in range(first, last + 1)] == list(range(6))
    assert [source.model for source in sources([str(run)])] == [str(tiny_model), str(run / "pipeline")]


def test_card_and_report_tell_what_is_left_of_the_first_teacher(runs: Path) -> None:
    run = runs / "killed"
    plan = read(run / "plan.json")
    share = f"{plan['predicted']['params'] / plan['model']['first_params']:.1%}"
    card = (run / "pipeline" / "README.md").read_text()
    assert f"{share} of those of `model` itself" in card
    assert "(this is round 2)" in card
    assert "transformer_blocks: 6 -> " in card
    page = (run / "report.html").read_text()
    assert f"{share} of the first teacher" in page
    assert f"<b>{share}</b>" in page


def test_a_folder_of_other_rounds_is_refused_at_once(runs: Path, refuses: Refuses, common: Any) -> None:
    options = (*common, "--keep", 0.6, "--set", "device=cpu")
    for count, says in ((1, "round-1"), (3, "not one after round-2")):
        refuses("compress", *options, "--out", runs / "killed", "--rounds", count, says=[says], watch=runs / "killed")


def test_a_round_made_anew_takes_what_followed_along(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(runs / "killed", tmp_path / "run")
    model = str(out / "round-1" / "pipeline")
    rounds.make_way(out, model)
    assert (out / "bundle").is_dir() and not caplog.text
    config = out / "round-1" / "pipeline" / "transformer" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    rounds.make_way(out, model)
    assert "made again" in caplog.text
    left = {path.name for path in out.iterdir()}
    assert left == {"round-1", "config.yaml", "log.jsonl", ".lock", ".lock.pid", "stages.json"}
    folder = RunFolder(out, model, "another", {}, "round-1")
    assert not any(folder.record_of(stage) for stage in STAGES.values())
    with pytest.raises(ArtifactError, match="holds a run of"):
        RunFolder(out, model, "another", {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rounds", 0), ["plan.rounds = 0", "greater than or equal to 1"]),
        (("--set", "plan.rounds=two"), ["plan.rounds = 'two'"]),
        (("--rounds", 2, "--fit", "1GB"), ["plan.rounds", "plan.fit_gb"]),
        (("--rounds", 2, "--set", "distill.fresh=8", "--set", "capture.data=x"), ["plan.rounds", "distill.fresh"]),
    ],
)
def test_bad_rounds_are_refused_in_one_line(
    options: tuple[Any, ...], says: list[str], refuses: Refuses, common: Any, tmp_path: Path
) -> None:
    refuses("compress", *common, "--out", tmp_path / "run", *options, says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["plan", "ladder", "compare", "evaluate"])
def test_other_commands_do_no_rounds(command: str, refuses: Refuses, common: Any, run_copy: Path) -> None:
    refuses(command, *common, "--out", run_copy, "--set", "plan.rounds=2", says=["plan.rounds=2", "ppcl compress"])


def test_a_folder_of_one_round_is_no_place_for_two(refuses: Refuses, common: Any, run_copy: Path) -> None:
    refuses("compress", *common, "--out", run_copy, "--rounds", 2, says=["not one after round-1"], watch=run_copy)


@pytest.mark.parametrize("kind", ["keep", "speedup"])
def test_budgets_lie_on_a_geometric_line(kind: str, tiny_info: Any) -> None:
    """Each round is asked for what the rounds before left of it, as they were predicted to leave."""
    value = 0.5 if kind == "keep" else 2.0
    config = load_config([], [f"plan.{kind}={value}", "plan.rounds=3", "distill.sparsity.share=0.5"])

    def settings(number: int, *done: float) -> RunConfig:
        plans = [CompressionPlan(tiny_info, "", {}, {}, Prediction(1, x, x, 1, None)) for x in done]
        return rounds._settings(config, number, plans)

    first, second, third = settings(1), settings(2, 0.75 if kind == "keep" else 1.3), settings(3, value, 1.0)
    assert first.plan.budget == (kind, pytest.approx(value ** (1 / 3)))
    assert second.plan.budget[1] == pytest.approx(value ** (2 / 3) / (0.75 if kind == "keep" else 1.3))
    assert third.plan.budget == (kind, 1.0)  # there is nothing left to do
    assert {c.plan.rounds for c in (first, second, third)} == {1}
    assert [bool(c.distill.sparsity.zeros) for c in (first, second, third)] == [False, False, True]


@pytest.fixture
def tiny_info(finished_run: Path) -> Any:
    from ppcl.common.artifacts import load_artifact

    return load_artifact(CompressionPlan, finished_run / "plan.json").model


def test_the_stages_between_rounds_end_with_a_pipeline() -> None:
    assert rounds.PRUNING[-1] == "export"
    assert set(rounds.PRUNING) < set(STAGES)


if __name__ == "__main__":
    act(Path(sys.argv[1]), *sys.argv[2:])
