"""What each way of recovery brings, at which time and memory: plans of depth alone after corrections and training.

    python benchmarks/correction.py RUN docs/correction.md

RUN is a run of `ppcl fit emoji --out RUN`. Substitutes start as the fit stage left them; nothing in RUN is changed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table
from ppcl.config import DistillConfig, PlanConfig
from ppcl.distill.memory import estimate_distill, estimate_streamed
from ppcl.distill.recipe import HELD_OUT
from ppcl.distill.trainer import Distiller
from ppcl.pruning.artifacts import load_candidates
from ppcl.pruning.planner import plan
from ppcl.student.assembly import RunKey
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline
from ppcl.teacher.velocity import VelocityErrors

LIGHT = {"train": "lora", "lora_rank": 8, "checkpointing": True, "batch_size": 4, "accumulate": 6}
# what each goes on from, its own part, and the least settings of it, with which memory is predicted
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("", {}),
    "correction": ("nothing", {"correct": True}),
    "local": ("nothing", {"local_steps": 40}),
    "local, correction": ("local", {"correct": True}),
    "local, carried": ("local", {"carried_steps": 20}),
    "local, carried for longer": ("local", {"carried_steps": 60}),
    "local, correction, carried": ("local", {"correct": True, "carried_steps": 20}),
    "local, output": ("local", {"output_steps": 40}),
    "local, output for longer": ("local", {"output_steps": 120}),
    "local, output by LoRA, checkpointed, in parts": ("local", {"output_steps": 40, **LIGHT}),
    "local, correction, output": ("local, correction", {"output_steps": 40}),
    "local, correction, carried, output": ("local, correction, carried", {"output_steps": 40}),
}


class Recovery:
    """Trains plans of a run.

    Args:
        run: The run directory.
        transformer: The teacher's.
        states: Training states, of those that were captured.
        is_quick: Two steps of everything.
    """

    def __init__(self, run: Path, transformer: Any, states: int, is_quick: bool = False) -> None:
        self.run, self.transformer, self.is_quick = run, transformer, is_quick
        train, held_out = (States(run / "calibration", split) for split in ("train", "held-out"))
        self.train = train.only(set(train.spread(states)))
        judged = set(held_out.spread()) - set(held_out.spread(HELD_OUT))  # those choose the ridge
        self.judged = held_out.only(judged or set(held_out.spread()))

    def after(
        self, plan: CompressionPlan, start: Mapping[RunKey, nn.Module], settings: DistillConfig, seed: int
    ) -> Distiller:
        """Go on from some substitutes, which are left as they are."""
        with tempfile.TemporaryDirectory() as folder:
            common = (self.transformer, adapter_for(self.transformer), plan, self.run / "calibration", Path(folder))
            files = {"fitted": self.run / "candidates.safetensors", "closed_forms": self.run / "analysis.safetensors"}
            distiller = Distiller(*common, settings, seed, states=self.train, **files)
            for key, block in start.items():
                distiller.substitutes[key].load_state_dict(copy.deepcopy(block.state_dict()))
            distiller.run()
        return distiller

    @torch.no_grad()
    def error(self, student: nn.Module) -> float:
        """The relative velocity error on states that neither trained nor chose anything."""
        errors = VelocityErrors()
        for call in self.judged.answered(48):
            errors.add(call.velocity, velocity(student, call.arguments))
        return errors.relative


def peak_of(recovery: Recovery, plan: CompressionPlan, settings: DistillConfig) -> str:
    """Predicted peak of a stage, MB: of those that go block by block as with streamed blocks, where they need least."""
    transformer, parts = recovery.transformer, settings.accumulate
    common = (transformer, adapter_for(transformer), plan, recovery.train.largest(settings.batch_size, parts), settings)
    found = estimate_distill(*common) if settings.output_steps else estimate_streamed(*common)
    return f"{max(estimate.total for estimate in found.values()) / 1e6:.0f}" if found else ""


def rows_of(recovery: Recovery, plan: CompressionPlan, seeds: Sequence[int]) -> list[list[str]]:
    """A row for each way: its last part's steps, errors, CPU seconds and peak of memory."""
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds, peaks, steps = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, ""), dict.fromkeys(WAYS, "")
    for seed in seeds:
        trained: dict[str, Mapping[RunKey, nn.Module]] = {"": {}}
        for way, (start, changes) in WAYS.items():
            settings = DistillConfig(**{"local_steps": 0, "output_steps": 0, "keep_start": False, **changes})
            if recovery.is_quick:
                settings = settings.model_copy(update={key: 2 for key in changes if key.endswith("_steps")})
            began = time.process_time()
            distiller = recovery.after(plan, trained[start], settings, seed)
            seconds[way] += (time.process_time() - began) / len(seeds)
            trained[way] = distiller.substitutes
            peaks[way] = peak_of(recovery, plan, settings)
            steps[way] = str(next((count for key, count in changes.items() if key.endswith("_steps")), ""))
            errors[way].append(recovery.error(distiller.student))
            print(f"{plan.budget} seed {seed} {way}: {errors[way][-1]:.4f}, {seconds[way]:.0f} s", flush=True)
    return [
        [way, steps[way], *(f"{error:.4f}" for error in found), f"{seconds[way]:.0f}", peaks[way]]
        for way, found in errors.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--keeps", default="0.84,0.7,0.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--states", type=int, default=400, help="training states")
    parser.add_argument("--quick", action="store_true", help="two steps of everything, to see that it works")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    recovery = Recovery(
        given.run, load_pipeline(given.model, torch.device("cpu")).transformer, given.states, given.quick
    )
    analysis, candidates = load_artifact(Analysis, given.run / "analysis.json"), load_candidates(given.run)
    seeds, parts = [int(seed) for seed in given.seeds.split(",")], []
    for keep in map(float, given.keeps.split(",")):
        chosen = plan(analysis, candidates, PlanConfig(keep=keep, width=()))
        gone = sum(segment.last - segment.first for _, segment in chosen.runs)
        of_seeds = [f"error, seed {seed}" for seed in seeds]
        header = ["recovery", "steps of its last part", *of_seeds, "CPU seconds of it", "peak memory of it, MB"]
        table = markdown_table(header, rows_of(recovery, chosen, seeds))
        parts.append(f"## keep {keep:g}: {gone} blocks removed in {len(chosen.runs)} runs\n\n{table}\n")
    text = (
        f"# Ways of recovery, plans of depth alone\n\nWritten by `python benchmarks/correction.py RUN {given.out} "
        f"--keeps {given.keeps} --seeds {given.seeds} --states {given.states}`: relative velocity errors on "
        f"{len(recovery.judged)} held-out states, one thread; batches of 24, starts are the fit stage's. Carried "
        "steps are those of each substitute. Memory is predicted (weights, gradients, optimizer, average, activations) "
        "of what goes block by block with two blocks and one substitute in memory, of the output stage with the whole "
        f"teacher and student; `by LoRA` is {LIGHT}.\n\n" + "\n".join(parts)
    )
    write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
