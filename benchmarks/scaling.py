"""A run by 1 and by more processes: seconds of whole stages, and samples a second of joint training.

Each number of processes starts from a copy of one captured run, through torch's launcher. Analysis, fit and the local
stage one run at a time share their work without waiting for each other at every step; joint training splits each batch.
Seconds are those of the run's ledger, samples a second those of its log.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import parser, publish

from ppcl.cli.options import Budget, Settings, resolve
from ppcl.common.tables import markdown_table
from ppcl.run import open_run

SHARED = ("analyze", "fit", "distill")  # stages whose seconds are told
JOINT = ("local", "output")


def prepare(args: argparse.Namespace, folder: Path) -> list[str]:
    """Capture the states of a run; returns its settings."""
    quick = ["plan.keep=0.9", "fit.width=[]", "fit.eval_states=8"]  # on whatever the config says is small
    size = quick if args.quick else ["plan.keep=0.6", "capture.num_prompts=96"]
    steps = 3 if args.quick else args.steps
    settings = [*size, f"fit.steps={steps}", "fit.max_candidates=16", f"distill.local_steps={steps}"]
    settings += ["distill.keep_start=false", "distill.from_fit=false", f"threads={args.threads}"]
    settings += [f"distill.batch_size={args.batch_size}", *(args.set or [])]
    run = open_run(args.model, folder, resolve(args.model, Settings(args.config, settings), Budget()), args.prompts)
    run.run("capture")
    return settings


def take(args: argparse.Namespace, folder: Path, settings: list[str], processes: int, stages: Sequence[str]) -> None:
    """Run stages in so many processes, the plan in one."""
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": paths}
    for stage in stages:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command = [sys.executable, "-m", *(launcher if stage in SHARED else []), "ppcl", stage, args.model]
        command += ["--out", str(folder)]
        command += [part for path in args.config or () for part in ("--config", str(path))]
        command += [part for text in settings for part in ("--set", text)]
        command += ["--prompts", str(args.prompts)] if args.prompts else []
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def stage_seconds(args: argparse.Namespace, folder: Path, settings: list[str], processes: int) -> dict[str, float]:
    """Seconds of each shared stage; the local stage trains one run at a time."""
    own = [*settings, "distill.output_steps=0", "distill.one_at_a_time=true"]
    take(args, folder, own, processes, ("analyze", "fit", "plan", "distill"))
    ledger = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return {stage: float(ledger[stage]["seconds"]) for stage in SHARED}


def samples_per_second(args: argparse.Namespace, folder: Path, settings: list[str], processes: int) -> dict[str, float]:
    """Distil jointly; the median of each stage, without its first steps."""
    (folder / "log.jsonl").unlink()
    steps = 3 if args.quick else args.steps
    take(args, folder, [*settings, f"distill.output_steps={steps}"], processes, ("distill",))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {stage: [r["seconds"] for r in rows if r["stage"] == f"distill.{stage}"] for stage in JOINT}
    return {stage: args.batch_size / statistics.median(times[len(times) // 4 :]) for stage, times in seconds.items()}


def main(argv: list[str] | None = None) -> str:
    """Run the benchmark; returns the Markdown text."""
    made = parser(__doc__ or "")
    made.set_defaults(threads=1)
    made.add_argument("--steps", type=int, default=40, help="of each training")
    made.add_argument("--batch-size", type=int, default=24, help="states a step, over all processes")
    made.add_argument("--processes", default="1,2")
    args = made.parse_args(argv)
    counts = [int(part) for part in args.processes.split(",")]
    seconds: dict[int, dict[str, float]] = {}
    rates: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        settings = prepare(args, Path(place) / "run")
        for count in counts:
            folder = Path(place) / f"run-{count}"
            shutil.copytree(Path(place) / "run", folder)
            seconds[count] = stage_seconds(args, folder, settings, count)
            rates[count] = samples_per_second(args, folder, settings, count)
    first = counts[0]
    stages = ["processes", *(text for stage in SHARED for text in (f"{stage}, seconds", "times as fast"))]
    whole = [
        [str(n), *(text for s in SHARED for text in (f"{took[s]:.1f}", f"{seconds[first][s] / took[s]:.2f}"))]
        for n, took in seconds.items()
    ]
    joint = ["processes", *(text for stage in JOINT for text in (f"{stage}, samples a second", "times as fast"))]
    rows = [
        [str(n), *(text for s in JOINT for text in (f"{rate[s]:.1f}", f"{rate[s] / rates[first][s]:.2f}"))]
        for n, rate in rates.items()
    ]
    reading = (
        f"{args.threads} thread(s) a process, gloo, {os.cpu_count()} cores. The distill stage of the first table is "
        f"the local one, one run at a time; joint training has one global batch of {args.batch_size} states, medians "
        "of the steps, the first quarter left out. Losses and weights are those of one process "
        "(tests/unit/test_distributed.py)."
    )
    parts = ["# A run by several processes", markdown_table(stages, whole), "## Joint training"]
    text = "\n\n".join([*parts, markdown_table(joint, rows), reading])
    return publish(args, argv, "scaling.py", text, "cpu")


if __name__ == "__main__":
    main()
