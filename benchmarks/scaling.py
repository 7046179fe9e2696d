"""Distillation by 1 and by more processes: samples a second of the local and the output stage, one global batch.

Each number of processes starts from a copy of one run whose plan is made, through torch's launcher; the medians are
those of the run's own log.
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
from pathlib import Path

from common import parser, publish

from ppcl.cli.options import Budget, Settings, resolve
from ppcl.common.tables import markdown_table
from ppcl.run import open_run

QUICK_FIT = ["fit.width=[]", "fit.steps=0", "fit.max_candidates=16", "fit.eval_states=8"]
STAGES = ("local", "output")


def prepare(args: argparse.Namespace, folder: Path) -> list[str]:
    """Make a run as far as its plan; returns the settings that its distill stage must be given, too."""
    quick = ["plan.keep=0.9"]  # on whatever the config says is small
    size = quick if args.quick else ["plan.keep=0.6", "capture.num_prompts=64"]
    steps = 3 if args.quick else args.steps
    common = [*QUICK_FIT, *size, f"distill.local_steps={steps}", f"distill.output_steps={steps}"]
    settings = [*common, "distill.keep_start=false", "distill.from_fit=false", f"threads={args.threads}"]
    settings += [f"distill.batch_size={args.batch_size}", *(args.set or [])]
    run = open_run(args.model, folder, resolve(args.model, Settings(args.config, settings), Budget()), args.prompts)
    for stage in ("capture", "analyze", "fit", "plan"):
        run.run(stage)
    return settings


def samples_per_second(args: argparse.Namespace, folder: Path, settings: list[str], processes: int) -> dict[str, float]:
    """Distil in so many processes; the median of each stage, without its first steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "ppcl", "distill", args.model, "--out", str(folder), "--processes", str(processes)]
    command += [part for path in args.config or () for part in ("--config", str(path))]
    command += [part for text in settings for part in ("--set", text)]
    command += ["--prompts", str(args.prompts)] if args.prompts else []
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": paths}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {stage: [r["seconds"] for r in rows if r["stage"] == f"distill.{stage}"] for stage in STAGES}
    return {stage: args.batch_size / statistics.median(times[len(times) // 4 :]) for stage, times in seconds.items()}


def main(argv: list[str] | None = None) -> str:
    """Run the benchmark; returns the Markdown text."""
    made = parser(__doc__ or "")
    made.set_defaults(threads=1)
    made.add_argument("--steps", type=int, default=40, help="of each stage")
    made.add_argument("--batch-size", type=int, default=24, help="states a step, over all processes")
    made.add_argument("--processes", default="1,2")
    args = made.parse_args(argv)
    counts = [int(part) for part in args.processes.split(",")]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        settings = prepare(args, Path(place) / "run")
        for count in counts:
            shutil.copytree(Path(place) / "run", Path(place) / f"run-{count}")
            found[count] = samples_per_second(args, Path(place) / f"run-{count}", settings, count)
    first = found[counts[0]]
    header = ["processes", *(text for stage in STAGES for text in (f"{stage}: samples a second", f"of {counts[0]}"))]
    rows = [
        [str(n), *(text for stage in STAGES for text in (f"{rate[stage]:.1f}", f"{rate[stage] / first[stage]:.2f}"))]
        for n, rate in found.items()
    ]
    reading = (
        f"One global batch of {args.batch_size} states, {args.threads} thread(s) a process, gloo, {os.cpu_count()} "
        "cores; medians of the steps in the run's own log, the first quarter left out. The losses are those of one "
        "process (tests/unit/test_distributed.py)."
    )
    text = "\n\n".join(["# Distillation by several processes", markdown_table(header, rows), reading])
    return publish(args, argv, "scaling.py", text, "cpu")


if __name__ == "__main__":
    main()
