"""What does one local distillation step cost against the ideal, and against the ordinary way?

    python benchmarks/distill_step.py --table docs/distill_step.md

Ideal: the teacher's blocks up to the last run once, and three times each substitute's forward
pass (forward, and a backward of twice its cost), each block measured in the same run. Ordinary:
the losses of all substitutes are summed and there is one backward pass, so all graphs live at
once. Activation memory is what autograd saves for backward, weights excluded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import alternate, capture_states, load, megabytes, parser, publish, seconds
from torch import Tensor, nn

from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.common.streams import step_generator
from ppcl.common.tables import markdown_table, number
from ppcl.config import RunConfig
from ppcl.distill.local import last_block, local_backward, masks_of
from ppcl.experiments.baselines import nearest_rung, run_keys
from ppcl.pruning.planner import uniform_ladder
from ppcl.student.assembly import RunKey, start_block
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter
from ppcl.teacher.trace import record_boundaries, run_traced
from ppcl.training.losses import state_loss

Substitutes = Mapping[RunKey, nn.Module]


class _Saved:
    """A tensor that autograd keeps; it is counted while this holder lives."""

    def __init__(self, tensor: Tensor, meter: SavedBytes) -> None:
        self.tensor, self.meter = tensor, meter
        storage = tensor.untyped_storage()
        self.key = storage.data_ptr()
        meter.add(self.key, storage.nbytes())

    def __del__(self) -> None:
        self.meter.drop(self.key)


class SavedBytes:
    """Counts the live bytes that autograd saves for backward, each storage once, and their peak.

    Args:
        lasting: Addresses of storages that are there anyway and do not count.
    """

    def __init__(self, lasting: set[int]) -> None:
        self.lasting = lasting
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def add(self, key: int, size: int) -> None:
        """Count one more use of a storage."""
        entry = self.live.setdefault(key, [0, size])
        if entry[0] == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        entry[0] += 1

    def drop(self, key: int) -> None:
        """Forget one use; a storage without users no longer counts."""
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]

    def pack(self, tensor: Tensor) -> Any:
        """Hook of autograd: keep a tensor."""
        return tensor if tensor.untyped_storage().data_ptr() in self.lasting else _Saved(tensor, self)

    @staticmethod
    def unpack(saved: Any) -> Tensor:
        """Hook of autograd: give it back."""
        return saved.tensor if isinstance(saved, _Saved) else saved


def storages(tree: Any) -> set[int]:
    """Addresses of the storages of all tensors of a call's arguments."""
    if isinstance(tree, Tensor):
        return {tree.untyped_storage().data_ptr()}
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return set().union(*map(storages, items))


def lasting_storages(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], substitutes: Substitutes
) -> set[int]:
    """Storages that are there whether or not anything is trained: weights, and tables that every pass reuses."""
    passes = [record_boundaries(transformer, adapter, arguments)[0] for _ in range(2)]
    tables = [storages([call.arguments for call in calls.values()]) for calls in passes]
    weights = [p for module in (transformer, *substitutes.values()) for p in module.parameters()]
    return storages(weights) | (tables[0] & tables[1])


def peak_saved(call: Callable[[], object], lasting: set[int]) -> int:
    """Peak of the bytes saved for backward while ``call`` runs."""
    meter = SavedBytes(lasting)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
        call()
    return meter.peak


def ordinary_backward(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], substitutes: Substitutes, kind: str
) -> float:
    """All substitutes run, their losses are summed, one backward pass."""
    wanted = {(run[0], index) for run in substitutes for index in run[1:]}
    calls, _ = record_boundaries(transformer, adapter, arguments, wanted, last_block(adapter, substitutes))
    losses = []
    for (stack, first, last), block in substitutes.items():
        start, end = calls[stack, first], calls[stack, last]
        output = adapter.call(start.stack, block, start.inputs, start.arguments)
        losses.append(state_loss(output, end.outputs, masks_of(end.stack, end.arguments, end.outputs), kind))
    total = torch.stack(losses).sum()
    total.backward()
    return total.item()


def choose_substitutes(pipeline: Any, adapter: Adapter, config: RunConfig, plan_path: Path | None) -> Substitutes:
    """Untrained substitutes of a plan, or of evenly spread runs that remove two fifths of the blocks."""
    transformer, model = pipeline.transformer, describe(pipeline)
    if plan_path:
        keys = run_keys(load_artifact(CompressionPlan, plan_path))
    else:
        removed = round(0.4 * sum(stack.num_blocks for stack in model.stacks))
        keys = nearest_rung(uniform_ladder(model, config.plan), removed)
    specs = {spec.name: spec for spec in adapter.stacks}
    blocks = {name: adapter.blocks(transformer, spec) for name, spec in specs.items()}
    return {key: start_block(blocks[key[0]], key[1], key[2], "middle").to(torch.float32) for key in keys}


def block_seconds(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], substitutes: Substitutes, repeats: int
) -> tuple[float, float]:
    """Seconds of the teacher's blocks up to the last run, and of one forward pass of all substitutes.

    Every block is called by itself on recorded states, without gradients; medians of each.
    """
    calls, _ = record_boundaries(transformer, adapter, arguments, None, last_block(adapter, substitutes))

    def median(block: nn.Module, key: tuple[str, int]) -> float:
        call = calls[key]
        with torch.no_grad():
            times = [
                seconds(lambda: adapter.call(call.stack, block, call.inputs, call.arguments)) for _ in range(repeats)
            ]
        return statistics.median(times)

    stacks = {spec.name: adapter.blocks(transformer, spec) for spec in adapter.stacks}
    teacher = sum(median(stacks[name][index], (name, index)) for name, index in calls)
    return teacher, sum(median(block, run[:2]) for run, block in substitutes.items())


def measure(
    args: argparse.Namespace, pipeline: Any, adapter: Adapter, config: RunConfig, arguments: dict[str, Any]
) -> str:
    """Both tables as Markdown."""
    transformer, kind = pipeline.transformer, config.distill.loss
    substitutes = choose_substitutes(pipeline, adapter, config, args.plan)

    def clear(call: Callable[[], object]) -> Callable[[], None]:
        def wrapped() -> None:
            call()
            for block in substitutes.values():
                block.zero_grad(set_to_none=True)

        return wrapped

    stop = last_block(adapter, substitutes)
    local = clear(lambda: local_backward(transformer, adapter, arguments, substitutes, kind))
    ordinary = clear(lambda: ordinary_backward(transformer, adapter, arguments, substitutes, kind))

    def teacher_pass() -> None:
        with torch.no_grad():
            run_traced(transformer, adapter, arguments, lambda call: None, stop)

    before = block_seconds(transformer, adapter, arguments, substitutes, args.repeats)
    times = alternate({"local": local, "ordinary": ordinary, "teacher": teacher_pass}, args.repeats)
    after = block_seconds(transformer, adapter, arguments, substitutes, args.repeats)
    teacher, forward = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    ideal = teacher + 3 * forward
    rows = [
        ["ideal: teacher blocks up to the last run + 3 x substitutes", number(ideal), "1.00"],
        ["one local step", number(times["local"]), number(times["local"] / ideal)],
        ["ordinary way: losses summed, one backward", number(times["ordinary"]), number(times["ordinary"] / ideal)],
        ["(teacher pass up to the last run)", number(times["teacher"]), number(times["teacher"] / ideal)],
    ]
    memory = memory_rows(transformer, adapter, arguments, substitutes, local, ordinary, kind)
    note = (
        f"{len(substitutes)} substitutes for {sum(run[2] - run[1] + 1 for run in substitutes)} of the "
        f"teacher's blocks, the last one ending at block {stop[1]} of `{stop[0]}`; {args.batch_size} states a step; "
        f"medians of {args.repeats}, taking turns. The optimizer's step is the same in all and left out."
    )
    return "\n\n".join(
        [
            "# What one local distillation step costs",
            note,
            markdown_table(["", "seconds", "times the ideal"], rows),
            "Activation memory: what autograd saves for backward at the peak, weights excluded, in MB (1e6 bytes).",
            markdown_table(["", "MB", "times one substitute"], memory),
        ]
    )


def memory_rows(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    substitutes: Substitutes,
    local: Callable[[], None],
    ordinary: Callable[[], None],
    kind: str,
) -> list[list[str]]:
    """Rows of the table of activation memory."""
    lasting = lasting_storages(transformer, adapter, arguments, substitutes)
    alone = max(
        peak_saved(lambda one={run: block}: local_backward(transformer, adapter, arguments, one, kind), lasting)
        for run, block in substitutes.items()
    )
    peaks = {
        "one substitute block alone (the largest)": alone,
        "one local step": peak_saved(local, lasting),
        "ordinary way: losses summed, one backward": peak_saved(ordinary, lasting),
    }
    return [[name, megabytes(peak), number(peak / alone)] for name, peak in peaks.items()]


def main(argv: list[str] | None = None) -> str:
    made = parser("Cost of one local distillation step.")
    made.add_argument("--batch-size", type=int, default=24, help="states a step")
    made.add_argument("--plan", type=Path, help="a run's plan.json; evenly spread runs if empty")
    args = made.parse_args(argv)
    if args.quick:
        args.repeats, args.batch_size = 1, min(args.batch_size, 4)
    pipeline, adapter, config = load(args)
    with tempfile.TemporaryDirectory() as scratch:
        per_prompt = config.capture.states_per_prompt
        # twice as many as needed: prompts of other lengths do not share a batch
        num_prompts = max(4, -(-2 * args.batch_size // per_prompt))
        states = States(capture_states(args, pipeline, config, num_prompts, Path(scratch)), "train")
        arguments = states.sample(args.batch_size, step_generator(config.seed, 0, 31))
    text = measure(args, pipeline, adapter, config, arguments)
    return publish(args, argv, "distill_step.py", text, str(pipeline.device))


if __name__ == "__main__":
    main()
