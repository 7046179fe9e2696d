"""The real command from end to end, and what a second and a changed call do."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("capture", "analyze", "fit", "plan", "distill", "export", "evaluate", "report")


def modes(folder):
    """The permissions of files and of folders below a folder."""
    found = {False: set(), True: set()}
    for path in folder.rglob("*"):
        found[path.is_dir()].add(oct(stat.S_IMODE(path.stat().st_mode)))
    return found[False], found[True]


def times(folder):
    """When each file was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def compressed(tiny_model, prompts_file, small_config, made_once):
    """The run directory, the arguments that made it, and what was printed by a process of its own, of umask 077."""
    name = "a run [1]"  # that shells and markup could trip over

    def arguments(folder):
        options = ("--config", small_config, "--prompts", prompts_file, "--keep", 0.8, "--set", "device=cpu")
        return "compress", tiny_model, "--out", folder / name, *options

    def make(folder):
        command = [sys.executable, "-m", "ppcl.cli", *map(str, arguments(folder))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, umask=0o077)
        assert done.returncode == 0, done.stderr
        (folder / "printed.json").write_text(json.dumps({"stdout": done.stdout, "stderr": done.stderr}))

    folder = made_once("compressed", make)
    printed = json.loads((folder / "printed.json").read_text())
    return folder / name, arguments(folder), SimpleNamespace(**printed)


def test_one_command_writes_everything(compressed, tiny_model):
    out, _, result = compressed
    expected = {
        *("config.yaml", "stages.json", "analysis.json", "analysis.safetensors", "candidates.json"),
        *("candidates.safetensors", "plan.json", "bundle/bundle.json", "bundle/plan.json"),
        *("bundle/substitutes.safetensors", "pipeline/model_index.json", "pipeline/README.md"),
        *("pipeline/transformer/diffusion_pytorch_model.safetensors", "eval/metrics.json", "report.html", "log.jsonl"),
        *("calibration/train-0000.safetensors", "calibration/held-out-0000.safetensors"),
    }
    assert expected <= set(times(out))
    assert "Traceback" not in result.stderr
    assert "%|" not in result.stderr  # no progress bars outside a terminal
    for number, stage in enumerate(STAGES, 1):
        assert re.search(rf"^\[{number}/8\] {stage}: about \d.* left of all stages$", result.stderr, re.MULTILINE)
    assert "predicted:" in result.stderr
    assert result.stderr.index("  capture: ") < result.stderr.index("[1/8]")  # what the stages will take
    assert result.stderr.index("predicted:") < result.stderr.index("] distill")
    assert f'from_pretrained("{out / "pipeline"}")' in result.stdout
    assert f"report:  {out / 'report.html'}" in result.stdout
    record = yaml.safe_load((out / "config.yaml").read_text())
    assert record["config"]["plan"]["keep"] == 0.8
    assert record["command"].startswith("ppcl compress")


def test_the_pipeline_names_no_folder_of_this_machine(compressed, tiny_model):
    texts = [path for path in (compressed[0] / "pipeline").rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) > 5
    for path in texts:
        for folder in (tiny_model.parent, compressed[0].parent):
            assert str(folder) not in path.read_text(), path


def test_the_pipeline_is_what_the_plan_predicted(compressed):
    from diffusers import DiffusionPipeline

    out, _, _ = compressed
    plan = json.loads((out / "plan.json").read_text())
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    params = sum(p.numel() for p in pipeline.transformer.parameters())
    assert params == plan["predicted"]["params"] == metrics["models"][1]["params"]
    assert plan["predicted"]["param_ratio"] <= 0.8


def test_all_files_follow_the_umask(compressed, finished_run):
    assert modes(compressed[0]) == ({"0o600"}, {"0o700"})
    os.umask(umask := os.umask(0))
    assert modes(finished_run) == ({oct(0o666 & ~umask)}, {oct(0o777 & ~umask)})


def test_no_training_state_is_left(compressed):
    out, _, _ = compressed
    assert not (out / "checkpoints").exists()
    assert "removed and made again" not in compressed[2].stderr


def test_the_second_call_does_nothing(compressed, ppcl):
    out, arguments, _ = compressed
    before = times(out)
    code, _, stderr = ppcl(*arguments)
    assert code == 0, stderr
    assert stderr.count(": done before") == len(STAGES)
    assert times(out) == before


def test_another_budget_keeps_what_does_not_depend_on_it(compressed, ppcl, caplog, tmp_path):
    out = shutil.copytree(compressed[0], tmp_path / "run")
    arguments = [{compressed[0]: out, 0.8: 0.9}.get(argument, argument) for argument in compressed[1]]
    before = times(out)
    plan_before = (out / "plan.json").read_text()
    code, _, stderr = ppcl(*arguments)
    assert code == 0, stderr
    assert stderr.count(": done before") == 3
    assert f"{out} was made with other settings (plan.keep 0.8 -> 0.9): plan and what follows are rem" in caplog.text
    after = times(out)
    kept = ("calibration/", "analysis.", "candidates.")
    assert {k: v for k, v in after.items() if k.startswith(kept)} == {
        k: v for k, v in before.items() if k.startswith(kept)
    }
    for name in ("plan.json", "bundle/bundle.json", "pipeline/README.md", "eval/metrics.json", "report.html"):
        assert after[name] > before[name]
    assert (out / "plan.json").read_text() != plan_before


def test_a_missing_file_is_made_again(finished_run, tiny_model, prompts_file, small_config, tmp_path):
    from ppcl.config import load_config
    from ppcl.run import Run

    out = shutil.copytree(finished_run, tmp_path / "run")
    shard = out / "calibration" / "train-0001.safetensors"
    content, before = shard.read_bytes(), times(out / "calibration")
    shard.unlink()
    run = Run(str(tiny_model), out, load_config([small_config], []), prompts_file)
    assert run.is_done("capture") is False
    assert run.run("capture") is True
    assert shard.read_bytes() == content
    after = times(out / "calibration")
    assert after.pop("train-0001.safetensors") != before.pop("train-0001.safetensors")
    assert after == before
    assert run.is_done("report")


def test_metrics_hold_the_error_before_training(finished_run):
    row = json.loads((finished_run / "eval" / "metrics.json").read_text())["comparisons"][0]
    assert row["scale"]["velocity_error"] > 0
    assert row["fidelity"]["velocity_error"]["value"] > 0
