"""What does each stage of distillation bring, at equal time, and in how much memory?

    python benchmarks/recovery.py RUN --keep 0.7 --depth --seconds 30 --table docs/recovery.md

RUN is a run whose fit stage is done. The plan's substitutes are trained by the local stage, the same for all rows, and
then by one other stage for so many seconds; how many steps that is, is measured first. Errors are of the velocity on
held-out states, relative; memory is what the process takes beyond what it had before training, at its peak.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import parser, publish
from random_pipeline import anonymous_bytes

from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.common.tables import markdown_table, spread
from ppcl.config import DistillConfig, PlanConfig, for_model, load_config
from ppcl.distill.trainer import Distiller
from ppcl.eval.velocity import state_errors
from ppcl.pruning.artifacts import load_candidates
from ppcl.pruning.planner import plan
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline

EVERY = 0.01  # seconds between two looks at the memory
PROBE = 8  # steps that say how long one takes
ALONE = {"one_at_a_time": True}  # a substitute and its optimizer in memory, as at full size
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "local alone": ("", ALONE),
    "local, more steps": ("local_steps", ALONE),
    "carried": ("carried_steps", ALONE),
    "correction": ("", {**ALONE, "correct": True}),
    "correction, carried": ("carried_steps", {**ALONE, "correct": True}),
    "alternating": ("alternating_steps", {}),
    "output, substitutes": ("output_steps", {"train": "substitutes"}),
    "output, all blocks": ("output_steps", {"train": "all"}),
}


@dataclass(frozen=True)
class Trained:
    """What one training came to.

    Attributes:
        before: Velocity error of the untrained student.
        after: Of the trained one.
        seconds: Of the training.
        memory: Bytes at its peak, beyond what was there before.
    """

    before: float
    after: float
    seconds: float
    memory: int


@contextmanager
def watching() -> Iterator[list[int]]:
    """Yield a list that has the most bytes beyond those at the start, at the end."""
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def train(args: Namespace, changes: dict[str, Any], seed: int) -> Trained:
    """Train the plan of a run with some settings, in a process of its own."""
    torch.set_num_threads(args.threads)
    config = for_model(args.model, load_config(args.config or [], args.set or []))
    pipeline, run = load_pipeline(args.model, torch.device("cpu")), Path(args.run)
    transformer, adapter = pipeline.transformer, adapter_for(pipeline.transformer)
    budget = PlanConfig.model_validate({"keep": args.keep, **({"width": ()} if args.depth else {})})
    chosen = plan(load_artifact(Analysis, run / "analysis.json"), load_candidates(run), budget)
    base = {"local_steps": args.local, "carried_steps": 0, "alternating_steps": 0, "output_steps": 0}
    given = {**config.distill.model_dump(), "keep_start": False, "batch_size": args.batch, **base, **changes}
    settings = DistillConfig.model_validate(given)
    held_out = States(run / "calibration", "held-out")

    def error(student: Any) -> float:
        return state_errors(transformer, student, held_out.batches(48, args.states), "fp32").error.value

    with tempfile.TemporaryDirectory() as folder:
        files = {"fitted": run / "candidates.safetensors", "closed_forms": run / "analysis.safetensors"}
        common = (transformer, adapter, chosen, run / "calibration", Path(folder), settings, seed, "bf16")
        distiller = Distiller(*common, **files)
        before = error(distiller.student)
        with watching() as peak:
            began = time.perf_counter()
            distiller.run()
            seconds = time.perf_counter() - began
    return Trained(before, error(distiller.student), seconds, peak[0])


def seconds_a_step(args: Namespace, stage: str, settings: dict[str, Any], seed: int) -> float:
    """What one more step of a stage takes."""
    start = args.local if stage == "local_steps" else 0
    short, long = (train(args, {**settings, stage: start + n}, seed).seconds for n in (PROBE, 3 * PROBE))
    return max(1e-3, (long - short) / (2 * PROBE))


def alone(call: Callable[..., Any], *given: Any) -> Any:
    """Call in a process of its own, so that no training finds memory that another one left."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


def rows_of(args: Namespace, seeds: list[int]) -> list[list[str]]:
    """Train every stage with every seed."""
    rows, first = [], 0.0
    for name, (stage, settings) in STAGES.items():
        changes, steps = dict(settings), 0
        if stage:
            steps = max(1, round(args.seconds / alone(seconds_a_step, args, stage, settings, seeds[0])))
            changes[stage] = steps + (args.local if stage == "local_steps" else 0)
        found: list[Trained] = [alone(train, args, changes, seed) for seed in seeds]
        taken = statistics.fmean(one.seconds for one in found)
        first = first or taken
        memory = max(one.memory for one in found) / 1e6
        errors = [[one.before for one in found], [one.after for one in found]]
        rows.append([name, str(steps), f"{taken - first:.0f}", f"{memory:.0f}", *map(spread, errors)])
    return rows


def main(argv: list[str] | None = None) -> str:
    """Measure, print, and write the table."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("run", help="whose fit stage is done")
    made.add_argument("--keep", type=float, default=0.7)
    made.add_argument("--depth", action="store_true", help="fewer blocks alone, no smaller modules")
    made.add_argument("--local", type=int, default=40, help="steps of the local stage, of all rows")
    made.add_argument("--seconds", type=float, default=30, help="of the stage that follows")
    made.add_argument("--seeds", default="0,1,2")
    made.add_argument("--batch", type=int, default=24)
    made.add_argument("--states", type=int, default=96, help="held-out states that errors are of")
    args = made.parse_args(argv)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    header = ["after the local stage", "steps", "seconds more", "peak, MB", "velocity error before", "after"]
    what = "blocks alone" if args.depth else "blocks and smaller modules"
    text = (
        f"# Recovery, stage by stage\n\n{markdown_table(header, rows_of(args, seeds))}\n\n{args.keep:.0%} of the "
        f"parameters stay, {what}; {args.local} steps of the local stage for all, then {args.seconds:g} seconds of "
        f"the stage, as many steps as that gives here. {len(seeds)} training seed(s), mean and standard deviation; "
        f"{args.states} held-out states. Peak: beyond the teacher and the untrained substitutes. Local and carried "
        f"train one substitute at a time."
    )
    return publish(args, argv, "recovery.py", text, "cpu")


if __name__ == "__main__":
    main()
