"""Does memory grow with the depth of the model? The streamed sweep at full width, with random weights.

    python benchmarks/streamed_run.py --blocks 2 4 --table docs/streamed_run.md

Writes a Qwen-Image transformer of width 3072 in bfloat16 for each number of blocks (0.68 GB a block), and sweeps a few
states of 64 px forward through the streamed blocks, with the sums of the probes as the consumer. Each number of blocks
runs in a process of its own, which reports its peak of anonymous memory and its seconds a block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import parser, publish
from random_pipeline import WIDTH, anonymous_bytes, write_transformer

from ppcl.analysis.sums import BlockSums
from ppcl.analysis.sweep import Batch, Course, forward_sweep
from ppcl.capture.store import StateStore
from ppcl.common.tables import markdown_table
from ppcl.teacher.blocks import StreamedBlocks
from ppcl.teacher.calls import Call

IMAGE_TOKENS, TEXT_TOKENS, TEXT_WIDTH = (8, 8), 24, 128  # 64 px: latents of 16 x 16, patches of 2 x 2


class Peak:
    """Watches this process's anonymous memory in a thread of its own."""

    def __init__(self) -> None:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())


def states(number: int, size: int) -> Batch:
    """A batch of random states."""
    generator = torch.Generator().manual_seed(number)
    rows, columns = IMAGE_TOKENS

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator).bfloat16()

    arguments: dict[str, Any] = {
        "hidden_states": noise(rows * columns, 16),
        "encoder_hidden_states": noise(TEXT_TOKENS, TEXT_WIDTH),
        "encoder_hidden_states_mask": torch.ones(size, TEXT_TOKENS, dtype=torch.bool),
        "timestep": torch.rand(size, generator=generator).bfloat16(),
        "img_shapes": [[(1, rows, columns)]] * size,
    }
    split = "held-out" if number % 4 == 3 else "train"
    return Batch(number, split, number * size, lambda: Call(arguments, torch.zeros(size, 1)))


def worker(args: argparse.Namespace) -> None:
    """Sweep through one model and print what it took as JSON."""
    torch.set_num_threads(args.threads)
    batches = [states(number, args.batch_size) for number in range(args.states // args.batch_size)]
    held = {"train": args.states, "held-out": args.states}
    with tempfile.TemporaryDirectory(dir=args.worker) as folder:
        store = StateStore(Path(folder), "benchmark", memory=0)
        with Peak() as peak:
            began = time.perf_counter()
            source = StreamedBlocks(str(args.worker), torch.device("cpu"))
            built = time.perf_counter()
            forward_sweep(Course(source, batches, store), [BlockSums(held, 0, lambda place, totals: None)])
            swept = time.perf_counter()
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    result = {
        "anonymous_bytes": peak.bytes,
        "open_seconds": built - began,
        "block_seconds": (swept - built) / len(source.order),
        "disk_bytes": disk,
    }
    print(json.dumps(result))


def row(args: argparse.Namespace, argv: list[str], num_blocks: int) -> list[str]:
    """Write a model, sweep it in a process of its own, remove it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        began = time.perf_counter()
        params = write_transformer(Path(folder), num_blocks, args.width, TEXT_WIDTH)
        seconds = time.perf_counter() - began
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--worker", folder]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise SystemExit(answer.stderr)
    found = json.loads(answer.stdout.splitlines()[-1])
    return [
        str(num_blocks),
        f"{params / 1e9:.2f}B",
        f"{found['anonymous_bytes'] / 1e9:.2f}",
        f"{found['open_seconds']:.1f}",
        f"{found['block_seconds']:.1f}",
        f"{found['disk_bytes'] / 1e6:.1f}",
        f"{seconds:.0f}",
    ]


def main(argv: list[str] | None = None) -> str:
    """Measure, print, and write the table."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--blocks", type=int, nargs="+", default=[2, 4], help="numbers of blocks")
    made.add_argument("--width", type=int, default=WIDTH, help="features of a token")
    made.add_argument("--states", type=int, default=8, help="recorded states")
    made.add_argument("--batch-size", type=int, default=2, help="states at a time")
    made.add_argument("--folder", type=Path, help="where the models are written; a temporary place if not given")
    made.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    if args.worker:
        worker(args)
        return ""
    if args.quick:
        args.width, given = 256, [*given, "--width", "256"]
    rows = [row(args, given, number) for number in args.blocks]
    header = ["blocks", "parameters", "peak, GB", "open, s", "s a block", "states, MB on disk", "writing the model, s"]
    text = (
        f"# The streamed sweep\n\n{markdown_table(header, rows)}\n\n{args.states} states of {IMAGE_TOKENS[0] * 8} px, "
        f"{TEXT_TOKENS} text tokens, {args.batch_size} at a time; width {args.width}, bfloat16. Peak: anonymous memory "
        "of the process that sweeps, libraries included. Consumer: sums of the probes (two splits, two streams)."
    )
    return publish(args, argv, "streamed_run.py", text, "cpu")


if __name__ == "__main__":
    main()
