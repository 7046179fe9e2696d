"""What the benchmarks share: arguments, the teacher, states, alternating timing, the table file."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ppcl.capture.prompts import prompts_for
from ppcl.capture.trajectories import capture
from ppcl.cli.options import Budget, Settings, resolve
from ppcl.common.devices import resolve_device
from ppcl.common.files import write_text
from ppcl.common.tables import provenance
from ppcl.config import RunConfig
from ppcl.teacher.families import Adapter, adapter_for
from ppcl.teacher.loading import load_pipeline

HALF = 0.5  # of the parameters: what is planned at full size
FULL_SIZE = {"QwenImageTransformer2DModel": "Qwen-Image", "FluxTransformer2DModel": "FLUX.1"}


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", default="emoji", help="'emoji' (embedded), a pipeline folder, or a hub id")
    made.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    made.add_argument("--config", type=Path, action="append", help="YAML file(s), later ones win")
    made.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a key of the config")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument("--repeats", type=int, default=7, help="the median of so many is reported")
    made.add_argument("--quick", action="store_true", help="as little as possible, to see that it works")
    made.add_argument("--table", type=Path, help="also write the table here, e.g. docs/NAME.md")
    return made


def load(args: argparse.Namespace) -> tuple[Any, Adapter, RunConfig]:
    """Load the teacher, its adapter, and the config."""
    torch.set_num_threads(args.threads)
    config = resolve(args.model, Settings(args.config, args.set), Budget())
    pipeline = load_pipeline(args.model, resolve_device(config.device))
    return pipeline, adapter_for(pipeline.transformer), config


def capture_states(args: argparse.Namespace, pipeline: Any, config: RunConfig, num_prompts: int, folder: Path) -> Path:
    """Record states of so many prompts into ``folder``; few steps are enough to measure time and memory."""
    steps = min(config.capture.num_inference_steps, config.capture.states_per_prompt)
    prompts, _ = prompts_for(args.model, args.prompts, 4)
    settings = config.capture.model_copy(update={"num_prompts": num_prompts, "num_inference_steps": steps})
    capture(pipeline, prompts, folder, settings, config.seed)
    return folder


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def alternate(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, in both directions, after one uncounted turn.

    Whatever else the machine does then hits all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(repeats):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            times[name].append(seconds(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def publish(args: argparse.Namespace, argv: list[str] | None, script: str, text: str, device: str) -> str:
    """Print the table with command, device and versions; write it where ``--table`` says."""
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    text = f"{text}\n\n{provenance(f'python benchmarks/{script} {given}'.rstrip(), device)}\n"
    print(text)
    if args.table:
        write_text(args.table, text)
    return text


def megabytes(count: float) -> str:
    """Bytes as MB (1e6)."""
    return f"{count / 1e6:,.2f}"


def real_arguments(arguments: Mapping[str, Any], shape: Any) -> dict[str, Any]:
    """Random inputs of the shapes of an example call, on the device and in the dtype of ``shape``."""
    generator = torch.Generator().manual_seed(1)

    def fill(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return torch.rand(tree.shape, generator=generator).to(shape.device, shape.dtype)
        return type(tree)(map(fill, tree)) if isinstance(tree, list) else tree

    return {name: fill(value) for name, value in arguments.items()}
