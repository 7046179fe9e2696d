"""What does the analysis cost beside bare teacher passes over the same states, in time and memory?

    python benchmarks/analysis_cost.py --table docs/analysis_cost.md

Time: one process, taking turns. Memory: the sums and tokens that are held for a block, and the
growth of the resident set of a fresh process, for N states and for four times as many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import alternate, capture_states, load, megabytes, parser, publish, seconds
from torch import nn

from ppcl.analysis.analyze import analyze
from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.findings import Findings
from ppcl.analysis.kept_tokens import KeptTokens
from ppcl.analysis.sums import BlockSums, Totals
from ppcl.analysis.sweep import Course, batches_of, forward_sweep
from ppcl.capture.states import States
from ppcl.capture.store import StateStore
from ppcl.capture.trajectories import SPLITS
from ppcl.common.artifacts import load_artifact
from ppcl.common.tables import markdown_table, number
from ppcl.common.tensor_files import StoredTensors
from ppcl.config import RunConfig
from ppcl.distill.fit import fit
from ppcl.eval.speed import measure_memory
from ppcl.teacher.blocks import Place, ResidentBlocks
from ppcl.teacher.call_arguments import batch_size, to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter
from ppcl.teacher.flops import count_flops


@torch.no_grad()
def bare_passes(transformer: nn.Module, calibration: Path, batch_size: int) -> None:
    """Run the teacher over all states and do nothing else; the states are read as the analysis reads them."""
    device = next(transformer.parameters()).device
    for split in SPLITS:
        for batch in States(calibration, split).batches(batch_size):
            velocity(transformer, to_device(batch, device))


def splits_of(calibration: Path) -> dict[str, States]:
    """The states of both splits."""
    return {split: States(calibration, split) for split in SPLITS}


def held_bytes(transformer: nn.Module, calibration: Path, config: RunConfig, folder: Path) -> int:
    """Sweep over the states; the most bytes of sums and kept tokens that are held for a block."""
    splits, most = splits_of(calibration), 0
    kept = KeptTokens(splits["held-out"], config.analyze.cka_tokens, config.seed, Findings(folder))

    def measure(_: Place, totals: Totals) -> None:
        nonlocal most
        tensors = [t for m in totals.moments.values() for t in (m.sum_x, m.sum_y, m.xx, m.xy)]
        tensors += [part for held in kept.kept.values() for part in held.tokens.values()]
        most = max(most, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    counts = {split: len(states) for split, states in splits.items()}
    sums, store = BlockSums(counts, config.analyze.rows_per_feature, measure), StateStore(folder, "benchmark")
    batches = batches_of(splits, config.analyze.batch_size)
    forward_sweep(Course(ResidentBlocks(transformer), batches, store), [sums, kept])
    store.close()
    return most


def count_states(calibration: Path) -> int:
    """States of both splits."""
    return sum(map(len, splits_of(calibration).values()))


def time_rows(pipeline: Any, config: RunConfig, calibration: Path, out: Path, repeats: int) -> list[list[str]]:
    """Rows of the table of times."""
    transformer, state = pipeline.transformer, next(States(calibration, "held-out").batches(1))
    source = ResidentBlocks(transformer)
    stacks = {name: list(source.adapter.blocks(transformer, spec)) for name, spec in source.stacks.items()}
    with torch.no_grad():
        flops = count_flops(transformer, stacks, lambda: velocity(transformer, state), batch_size(state))
    model = describe(pipeline, flops)
    size, seed = config.analyze.batch_size, config.seed
    calls: dict[str, Callable[[], object]] = {
        "bare teacher passes": lambda: bare_passes(transformer, calibration, size),
        "a sweep with all sums": lambda: held_bytes(transformer, calibration, config, out / "sweep"),
        "analyze stage (sweep, probes, CKA, files)": lambda: analyze(
            ResidentBlocks(transformer), model, calibration, out, config.analyze, seed
        ),
    }
    times = alternate(calls, repeats)

    def fit_stage() -> None:
        analysis = load_artifact(Analysis, out / "analysis.json")
        forms = StoredTensors(out / "analysis.safetensors")
        fit(ResidentBlocks(transformer), analysis, forms, calibration, out, config.fit, seed, protected=config.plan)

    times[f"fit stage ({config.fit.max_candidates} candidates, {config.fit.steps} steps; once)"] = seconds(fit_stage)
    bare = times["bare teacher passes"]
    return [[name, number(value), number(value / bare)] for name, value in times.items()]


def resident_growth(argv: list[str], calibration: Path) -> int | None:
    """Growth of the resident set by the analyze stage, in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--worker", str(calibration)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    growth = json.loads(result.stdout.splitlines()[-1])["growth_bytes"]
    return int(growth) if growth is not None else None


def worker(args: argparse.Namespace) -> None:
    """Run the analyze stage once and print its memory growth as JSON."""
    pipeline, _, config = load(args)
    with tempfile.TemporaryDirectory() as out:
        model = describe(pipeline)
        one = next(States(args.worker, "held-out").batches(1))
        with torch.no_grad():  # what the libraries allocate once is not the analysis'
            velocity(pipeline.transformer, to_device(one, pipeline.device))
        memory = measure_memory(
            lambda: analyze(
                ResidentBlocks(pipeline.transformer), model, args.worker, Path(out), config.analyze, config.seed
            ),
            pipeline.device,
        )
    print(json.dumps({"growth_bytes": memory.growth_bytes}))


def memory_rows(
    args: argparse.Namespace, argv: list[str], loaded: tuple[Any, Adapter, RunConfig], folders: tuple[Path, Path]
) -> list[list[str]]:
    """Rows of the table of memory, for the smaller and the larger set of states."""
    pipeline, _, config = loaded
    rows = []
    held = [held_bytes(pipeline.transformer, folder, config, folder / "sweep") for folder in folders]
    rows.append(["sums and tokens held for a block", *map(megabytes, held), number(held[1] / held[0])])
    files = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in folders]
    rows.append(["the states themselves (files)", *map(megabytes, files), number(files[1] / files[0])])
    if not args.quick:
        grown = [resident_growth(argv, folder) for folder in folders]
        if grown[0] and grown[1]:
            name = "growth of a fresh process by the analyze stage, states included"
            rows.append([name, *map(megabytes, filter(None, grown)), number(grown[1] / grown[0])])
    return rows


def main(argv: list[str] | None = None) -> str | None:
    made = parser("Cost of the analysis beside bare teacher passes.")
    made.add_argument("--num-prompts", type=int, default=32, help="prompts of the larger set of states")
    made.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args(argv)
    if args.worker:
        worker(args)
        return None
    if args.quick:
        args.repeats, args.num_prompts = 1, min(args.num_prompts, 8)
    given = sys.argv[1:] if argv is None else argv
    loaded = pipeline, _, config = load(args)
    with tempfile.TemporaryDirectory() as scratch:
        few = capture_states(args, pipeline, config, max(2, args.num_prompts // 4), Path(scratch) / "few")
        many = capture_states(args, pipeline, config, args.num_prompts, Path(scratch) / "many")
        counts = [count_states(folder) for folder in (few, many)]
        times = time_rows(pipeline, config, many, Path(scratch) / "out", args.repeats)
        memory = memory_rows(args, given, loaded, (few, many))
    text = "\n\n".join(
        [
            "# What the analysis costs",
            f"{counts[1]} states, batches of {config.analyze.batch_size}; medians of {args.repeats}, taking turns.",
            markdown_table(["", "seconds", "times bare passes"], times),
            "Memory in MB (1e6 bytes). The tokens that CKA keeps grow with the held-out states, up to "
            "`analyze.cka_tokens`.",
            markdown_table(["", *(f"{count} states" for count in counts), "ratio"], memory),
        ]
    )
    return publish(args, argv, "analysis_cost.py", text, str(pipeline.device))


if __name__ == "__main__":
    main()
