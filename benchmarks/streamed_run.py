"""Does memory grow with the depth of the model? Whole runs at full width, with random weights, block by block.

    python benchmarks/streamed_run.py --blocks 6 12 24 --table docs/streamed_run.md

Writes a QwenImagePipeline of width 3072 in bfloat16 for each number of blocks (0.68 GB a block, tiny text encoder and
VAE), and runs the real command on it, `ppcl compress` with `blocks=streamed`, in a process of its own. Its anonymous
memory (what no file stands behind) and the size of its run directory are looked at many times a second; the run's
ledger says in which stage. A stage that fails is a line of the table, and ends that run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from common import parser, publish
from random_pipeline import WIDTH, anonymous_bytes, write_pipeline

from ppcl.common.tables import markdown_table
from ppcl.config.names import STAGES as ORDER

EVERY = 0.03  # seconds between two looks at the memory
DISK_EVERY = 10  # looks at the memory between two at the disk
PROMPTS = [f"{adjective} {noun}" for adjective in ("red", "blue", "old", "tiny") for noun in ("cat", "house", "boat")]
SETTINGS = (
    "blocks=streamed", "capture.height=64", "capture.width=64", "capture.num_prompts=6", "capture.batch_size=2",
    "capture.num_inference_steps=3", "capture.states_per_prompt=2", "capture.held_out_share=0.34",
    "analyze.cka_tokens=64", "analyze.ridges=[0.01]", "plan.protect_first=0", "plan.protect_last=0", "fit.max_run=2",
    "fit.max_candidates=4", "fit.steps=2", "fit.batch_size=2", "fit.eval_states=2", "fit.width=[]",
    "distill.local_steps=4", "distill.output_steps=0", "distill.batch_size=2", "evaluate.num_prompts=4",
    "evaluate.num_inference_steps=2", "evaluate.batch_size=2", "evaluate.velocity_states=2",
    "evaluate.latency_runs=1", "evaluate.speed_batch_sizes=[1]", "evaluate.speed_steps=[2]",
    "evaluate.teacher_seeds=1", "evaluate.features=emoji",
)  # fmt: skip


@dataclass
class Seen:
    """What a stage took.

    Attributes:
        seconds: From the end of the stage before it, loading included.
        memory: The most anonymous memory, in bytes.
        disk: The most bytes in the run directory.
        error: What it failed with; empty if it did not.
    """

    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    error: str = ""


def stage_now(run: Path) -> str:
    """The first stage that the run's ledger does not have as done."""
    path = run / "stages.json"
    ledger = json.loads(path.read_text()) if path.is_file() else {}
    return next((stage for stage in ORDER if stage not in ledger), ORDER[-1])


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder; files and folders may come and go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # what is gone is no error to it
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def watched(command: list[str], run: Path, seen: dict[str, Seen], stage: str = "") -> int:
    """Run a command, and note what each stage of it takes, or the one it is of; returns its exit status."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        began, looks = time.perf_counter(), 0
        while process.poll() is None:
            row = seen.setdefault(stage or stage_now(run), Seen())
            try:
                row.memory = max(row.memory, anonymous_bytes(process.pid))
            except (OSError, StopIteration):  # it has just ended
                continue
            if looks % DISK_EVERY == 0 or not row.disk:
                row.disk = max(row.disk, bytes_in(run))
            looks += 1
            time.sleep(EVERY)
            began, passed = time.perf_counter(), time.perf_counter() - began
            row.seconds += passed
        if process.returncode:
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()] or ["nothing was said"]
            errors = [line for line in lines if "rror" in line] or lines
            seen.setdefault(stage or stage_now(run), Seen()).error = errors[-1][:160]
    return process.returncode


def take(args: Namespace, model: Path, run: Path) -> dict[str, Seen]:
    """Run the command on one model: all of it, or stage by stage up to one."""
    prompts = model / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    options = [str(model), "--out", str(run), "--prompts", str(prompts)]
    options += [part for path in args.config or () for part in ("--config", str(path))]
    settings = [*SETTINGS, f"threads={args.threads}", *(args.set or ())]
    options += [part for setting in settings for part in ("--set", setting)]
    seen: dict[str, Seen] = {}
    for name in ORDER[: ORDER.index(args.until) + 1] if args.until else ("compress",):
        command = [sys.executable, "-m", "ppcl", name, *options, "--keep", str(args.keep)]
        if watched(command, run, seen, name if args.until else ""):
            break
    return seen


def rows_of(args: Namespace, num_blocks: int) -> list[list[str]]:
    """Write a model, compress it, remove both."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, run = Path(folder) / "model", Path(folder) / "run"
        params = write_pipeline(model, num_blocks, PROMPTS, args.width)
        seen = take(args, model, run)
        held = bytes_in(model / "transformer")
    rows = []
    for stage in [stage for stage in ORDER if stage in seen]:
        row = seen[stage]
        numbers = [f"{row.memory / 1e9:.2f}", f"{row.disk / 1e9:.3f}", f"{row.seconds:.1f}"]
        rows.append([f"{num_blocks} ({params / 1e9:.2f}B, {held / 1e9:.2f} GB)", stage, *numbers, row.error])
    return rows


def growth(rows: list[list[str]]) -> str:
    """Per stage, the largest peak over the smallest."""
    peaks: dict[str, list[float]] = {}
    for _, stage, memory, *_, error in rows:
        if not error:
            peaks.setdefault(stage, []).append(float(memory))
    return ", ".join(f"{stage} {max(p) / max(min(p), 0.01) - 1:+.0%}" for stage, p in peaks.items() if len(p) > 1)


def main(argv: list[str] | None = None) -> str:
    """Measure, print, and write the table."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--blocks", type=int, nargs="+", help="numbers of blocks; 6 12 24 if not given")
    made.add_argument("--width", type=int, help=f"features of a token, a multiple of 128; {WIDTH} if not given")
    made.add_argument("--keep", type=float, default=0.7, help="share of the transformer's parameters that stays")
    made.add_argument("--until", choices=ORDER, help="run the stages one by one, each in its own process, up to this")
    made.add_argument("--folder", type=Path, help="where models and runs are written; a temporary place if not given")
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.width = args.width or (256 if args.quick else WIDTH)
    rows: list[list[str]] = []
    for number in args.blocks or ((3, 4) if args.quick else (6, 12, 24)):
        rows += rows_of(args, number)
    header = ["blocks", "stage", "peak of anonymous memory, GB", "run directory at most, GB", "seconds", "failed with"]
    grown = growth(rows)
    text = (
        f"# Streamed runs\n\n{markdown_table(header, rows)}\n\nWidth {args.width}, bfloat16, 64 px, "
        f"{args.threads} thread(s). Memory is that of the process, libraries included; a stage's time includes loading "
        f"what it needs. {f'From the smallest peak to the largest: {grown}.' if grown else ''}\n\n"
        f"Settings: `{' '.join([*SETTINGS, *(args.set or ())])}`."
    )
    given = sys.argv[1:] if argv is None else argv
    if args.folder:  # a place on this machine, which is nothing to others
        index = given.index("--folder")
        given = [*given[:index], *given[index + 2 :]]
    return publish(args, given, "streamed_run.py", text, "cpu")


if __name__ == "__main__":
    main()
