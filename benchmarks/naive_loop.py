"""A local distillation step of ours against the naive loop, in samples a second and peak memory.

    python benchmarks/naive_loop.py --threads 1 --table docs/naive_loop.md

Naive loop, as published code for this method does it: the teacher runs to its end; all substitutes
run, each under gradient checkpointing, their losses are summed, and there is one backward pass; the
chained student, in which every block sees what the student's block before it handed on, is computed
beside it and dropped. Ours (:func:`ppcl.distill.local.local_backward`): the teacher stops after the last run,
each substitute's backward pass comes at once, and there is no chained path. Losses and gradients are the same.
Substitutes learn independently of each other, so each takes its optimizer step at once, and the gradients of one are in
memory at a time; ``distill.release_gradients=false`` holds them to the end of the step.

Time is that of the process, not of the clock, so that other work on the machine counts little; on a GPU
it is the clock's. Peak memory is what a step allocates beyond what is there before it (activations,
gradients, temporaries), as the allocator says on a GPU, and counted operator by operator on a CPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import capture_states, load, megabytes, parser, publish, synchronize
from distill_step import Substitutes, choose_substitutes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl.capture.states import States
from ppcl.common.streams import step_generator
from ppcl.common.tables import markdown_table, number
from ppcl.distill.fake import LiveBytes
from ppcl.distill.local import local_backward, masks_of
from ppcl.student.assembly import RunKey
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.families import States as BlockStates
from ppcl.teacher.trace import record_boundaries
from ppcl.training.losses import state_loss


def call_checkpointed(
    adapter: Adapter, stack: StackSpec, block: nn.Module, inputs: BlockStates, arguments: dict[str, Any]
) -> BlockStates:
    """Run a block; keep its inputs alone and run it again in the backward pass."""
    made: BlockStates = checkpoint(adapter.call, stack, block, inputs, arguments, use_reentrant=False)
    return made


def naive_backward(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], substitutes: Substitutes, kind: str
) -> float:
    """One step of the naive loop; leaves gradients in the substitutes."""
    calls, _ = record_boundaries(transformer, adapter, arguments)  # everything is kept, and the teacher runs to its end
    losses = []
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        starts = {run[1]: run for run in substitutes if run[0] == spec.name}
        states, index = calls[spec.name, 0].inputs, 0
        while index < len(blocks):
            call = calls[spec.name, index]
            run = starts.get(index)
            block = substitutes[run] if run else blocks[index]
            end = calls[spec.name, run[2] if run else index]
            if run:
                output = call_checkpointed(adapter, spec, block, call.inputs, call.arguments)
                losses.append(state_loss(output, end.outputs, masks_of(end.stack, end.arguments, end.outputs), kind))
            states = call_checkpointed(adapter, spec, block, states, call.arguments)  # the chained path: dropped
            index = end.index + 1
    total = torch.stack(losses).sum()
    total.backward()
    return total.item()


def turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, taking turns, after one uncounted turn."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            began = clock()
            call()
            synchronize()
            if turn:
                times[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], object], lasting: Iterable[Tensor]) -> int:
    """Peak of what a call allocates beyond what was there."""
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes(lasting) as meter:
        call()
    return meter.peak


def measure(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], substitutes: Substitutes, kind: str, args: Any
) -> str:
    """The table as Markdown."""

    def drop(run: RunKey) -> None:
        substitutes[run].zero_grad(set_to_none=True)  # where the substitute's step would be taken

    def clear(step: Callable[..., object], **options: Any) -> Callable[[], None]:
        def cleared() -> None:
            step(transformer, adapter, arguments, substitutes, kind, **options)
            for run in substitutes:
                drop(run)

        return cleared

    calls = {
        "naive loop": clear(naive_backward),
        "ppcl": clear(local_backward, done=drop),
        "ppcl, distill.release_gradients=false": clear(local_backward),
    }
    times = turns(calls, args.repeats)
    lasting = [p for module in (transformer, *substitutes.values()) for p in module.parameters()]
    peaks = {name: peak_bytes(call, lasting) for name, call in calls.items()}
    naive = args.batch_size / times["naive loop"]
    rows = [
        [
            name,
            number(args.batch_size / times[name]),
            number(args.batch_size / times[name] / naive),
            megabytes(peaks[name]),
            number(peaks[name] / peaks["naive loop"]),
        ]
        for name in calls
    ]
    first = "samples a CPU second" if not torch.cuda.is_available() else "samples a second"
    blocks = sum(run[2] - run[1] + 1 for run in substitutes)
    gradients = sum(p.numel() * p.element_size() for block in substitutes.values() for p in block.parameters())
    note = (
        f"{len(substitutes)} substitutes for {blocks} blocks, {args.batch_size} states a step, "
        f"medians of {args.repeats} taking turns. "
        "Memory is what a step allocates beyond the weights; "
        f"{megabytes(gradients)} MB are gradients, which the naive loop needs all at once: its one backward pass gives "
        "them together. A substitute of ppcl takes its step when its own are there."
    )
    table = markdown_table(["", first, "of the naive loop", "peak memory, MB", "of the naive loop"], rows)
    return f"# A local distillation step against the naive loop\n\n{note}\n\n{table}"


def main(argv: list[str] | None = None) -> str:
    """Measure and print."""
    made = parser("Our local step against the naive loop.")
    made.add_argument("--batch-size", type=int, default=24, help="states a step")
    args = made.parse_args(argv)
    if args.quick:
        args.repeats, args.batch_size = 1, min(args.batch_size, 4)
    pipeline, adapter, config = load(args)
    with tempfile.TemporaryDirectory() as scratch:
        num_prompts = max(4, -(-2 * args.batch_size // config.capture.states_per_prompt))
        states = States(capture_states(args, pipeline, config, num_prompts, Path(scratch)), "train")
        arguments = states.sample(args.batch_size, step_generator(config.seed, 0, 31))
    substitutes = choose_substitutes(pipeline, adapter, config, None)
    text = measure(pipeline.transformer, adapter, arguments, substitutes, config.distill.loss, args)
    return publish(args, argv, "naive_loop.py", text, str(pipeline.device))


if __name__ == "__main__":
    main()
