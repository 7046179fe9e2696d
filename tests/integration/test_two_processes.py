"""The whole command under torch's launcher: two processes, one run directory, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def ppcl(*arguments: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *(launcher or []), "-m", "ppcl", *map(str, arguments)],
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_compress(tiny_model, prompts_file, small_config, tmp_path):
    options = ("--config", small_config, "--prompts", prompts_file, "--set", "device=cpu", "--processes", 2)
    out = tmp_path / "run"
    done = ppcl("compress", tiny_model, "--out", out, *options, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("2 processes training") == 1
    assert (out / "report.html").is_file()
    assert (out / "pipeline" / "model_index.json").is_file()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [(row["stage"], row["step"]) for row in rows if row["stage"] != "fit"]
    assert len(steps) == len(set(steps)) == 4 + 3  # one process writes
    fitted = [(row["run"], row["step"]) for row in rows if row["stage"] == "fit"]  # each by one process
    assert len(fitted) == len(set(fitted))
    assert all(row["samples_per_second"] > 0 for row in rows)
    # what two processes made, one accepts as done
    again = ppcl("compress", tiny_model, "--out", out, *options[:-2])
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 8
    # teacher and student split, pictures drawn on the way
    split = ("distill.shard=true", "distill.shard_teacher=true", "distill.train=all", "distill.sample_every=2")
    settings = [word for setting in (*split, "distill.output_steps=4") for word in ("--set", setting)]
    done = ppcl("compress", tiny_model, "--out", out, *options, *settings, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the teacher's blocks are split over 2 processes" in done.stderr
    assert "could not be drawn" not in done.stderr
    drawn = sorted(path.name for path in (out / "samples").glob("*.png"))
    assert drawn == ["step-000002.png", "step-000004.png", "teacher.png"]


def test_another_number_than_asked_is_one_line(tiny_model, tmp_path, refuses):
    says = ("2 processes were asked for, 1 train; start the command with",)
    refuses("compress", tiny_model, "--out", tmp_path / "run", "--processes", 2, says=says)
    assert not (tmp_path / "run").exists()
