"""How much memory a training step will take, before anything large is allocated.

Everything that lives throughout is counted from shapes: the teacher's weights as far as they are on the device, and
for each trained number its weight, gradient, optimizer state and moving average. What a step allocates beyond that
(activations, the teacher's working set, temporaries) follows no simple formula, so the step itself is run on fake
tensors (shapes and dtypes, no numbers; :class:`torch._subclasses.FakeTensorMode`), and every storage that an operator
makes is counted while it lives. Blocks of a stack are alike: one substitute stands for all, and the depth of a whole
student is extrapolated from one and two blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl.common.devices import autocast
from ppcl.common.tables import size_text
from ppcl.config import DistillConfig
from ppcl.distill.fake import fake_copy, fake_tree, simulated_peak
from ppcl.distill.local import local_losses
from ppcl.errors import TrainingError
from ppcl.modules.replacements import apply_width
from ppcl.pruning.sparsity import sparse_plan
from ppcl.student.assembly import RunKey, with_blocks
from ppcl.student.plan import CompressionPlan, start_index
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.flops import count_params
from ppcl.training.losses import velocity_loss

FLOAT = 4  # bytes of a trained number: substitutes are float32 whatever the teacher is


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step at its peak, on the device that trains.

    Attributes:
        teacher: Weights of the frozen model that are there.
        trained: Trained weights (float32), and a byte for each that may be one of the zeros.
        gradients: Of the trained weights that have left their backward pass when the last one runs.
        optimizer: Its states.
        average: The moving average.
        step: What a step allocates beyond these: activations, the last backward pass's own gradients, temporaries.
    """

    teacher: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    step: int

    @property
    def total(self) -> int:
        """The whole peak, bytes."""
        return sum(int(getattr(self, field.name)) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {size_text(getattr(self, field.name))}" for field in fields(self))
        return f"{size_text(self.total)} ({parts})"


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def optimizer_bytes(numbers: int, kind: str) -> int:
    """Bytes of the optimizer's states for so many trained numbers.

    Args:
        numbers: Trained numbers.
        kind: ``adamw`` (two float32) or ``adamw8bit`` (two bytes, and a float32 scale for each 256 of both).
    """
    return 2 * FLOAT * numbers if kind == "adamw" else 2 * numbers + 2 * FLOAT * numbers // 256


def local_step_bytes(
    transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any], runs: Iterable[RunKey], precision: str
) -> dict[str, int]:
    """What a local step of one substitute allocates at most, in each stack that has one.

    Of the teacher two blocks of the stack run, as at the end of any run: blocks before them leave nothing behind.

    Args:
        transformer: The teacher's, on any device.
        adapter: Its family.
        arguments: A batch of states.
        runs: The plan's.
        precision: ``fp32`` or ``bf16``.
    """
    # a mean over valid tokens has a size that depends on numbers; one over all tokens takes no less memory
    bare = replace(adapter, stacks=tuple(replace(spec, masks={}) for spec in adapter.stacks))
    peaks, known = {}, list(runs)
    for spec in adapter.stacks:
        members = [run for run in known if run[0] == spec.name]
        if not members:
            continue
        _, first, last = max(members, key=lambda run: run[2] - run[1])
        lists = {s.name: list(adapter.blocks(transformer, s))[:1] for s in adapter.stacks}
        blocks = list(adapter.blocks(transformer, spec))
        lists[spec.name] = blocks[first : min(first + 2, last + 1)]
        short = (spec.name, 0, len(lists[spec.name]) - 1)
        with FakeTensorMode(allow_non_fake_inputs=True):
            teacher = fake_copy(with_blocks(transformer, lists))
            block = fake_copy(blocks[start_index(first, last, "middle")], torch.float32).requires_grad_(True)
            batch = fake_tree(arguments)

            def step(
                teacher: nn.Module = teacher, batch: Any = batch, short: RunKey = short, block: nn.Module = block
            ) -> None:
                with autocast(torch.device("cpu"), precision):
                    local_losses(teacher, bare, batch, {short: block})

            peaks[spec.name] = simulated_peak(teacher, step, [block])
    return peaks


def output_step_bytes(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    depths: Mapping[str, int],
    precision: str,
    checkpointing: bool,
) -> int:
    """What a step through a whole student allocates at most, with the gradients of all of its blocks.

    Args:
        transformer: The teacher's, on any device.
        adapter: Its family.
        arguments: A batch of states.
        depths: Blocks of each stack of the student.
        precision: ``fp32`` or ``bf16``.
        checkpointing: Blocks are run again in the backward pass.
    """

    def peak(counts: Mapping[str, int]) -> int:
        lists = {s.name: list(adapter.blocks(transformer, s))[: counts[s.name]] for s in adapter.stacks}
        with FakeTensorMode(allow_non_fake_inputs=True):
            student: Any = fake_copy(with_blocks(transformer, lists), torch.float32).requires_grad_(True)
            if checkpointing:
                student.enable_gradient_checkpointing()
            batch = fake_tree(arguments)

            def step() -> None:
                with autocast(torch.device("cpu"), precision):
                    output = velocity(student, batch)
                velocity_loss(output, torch.empty_like(output)).backward()  # type: ignore[no-untyped-call]

            return simulated_peak(student, step)

    few = {name: min(2, count) for name, count in depths.items()}
    least = peak(few)
    return least + sum(
        (depth - few[name]) * (peak({**few, name: few[name] + 1}) - least)
        for name, depth in depths.items()
        if depth > few[name] and len(adapter.blocks(transformer, _spec(adapter, name))) > few[name]
    )


def _spec(adapter: Adapter, name: str) -> StackSpec:
    return next(spec for spec in adapter.stacks if spec.name == name)


def substitute_sizes(transformer: nn.Module, adapter: Adapter, plan: CompressionPlan) -> dict[RunKey, tuple[int, int]]:
    """Numbers in each substitute's weights, and how many of them are trained; nothing is built."""
    sizes = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        for segment in (s for s in plan.stacks[spec.name] if s.is_substitute):
            index = start_index(segment.first, segment.last, segment.start or "middle")
            with FakeTensorMode(allow_non_fake_inputs=True):
                block = fake_copy(blocks[index])
                apply_width(block, segment.width)
                new = sum(count_params(block.get_submodule(path)) for path in segment.width)
                whole = count_params(block)
            trained = whole if segment.is_run or segment.sparsity else new
            sizes[spec.name, segment.first, segment.last] = (whole, trained)
    return sizes


def _local(
    sizes: Mapping[RunKey, tuple[int, int]], teacher: int, peaks: Mapping[str, int], settings: DistillConfig, masks: int
) -> MemoryEstimate:
    """The local stage, from the sizes of its substitutes and the peak of one in each stack."""
    join = max if settings.one_at_a_time else sum
    resident = join(numbers for numbers, _ in sizes.values())
    numbers = join(trained for _, trained in sizes.values())
    # when the last substitute of a stack runs, the gradients of all before it may be waiting for the step
    order = list(peaks)
    waiting = {
        stack: sum(sizes[run][1] for run in [run for run in sizes if run[0] in order[: index + 1]][:-1])
        for index, stack in enumerate(order)
    }
    if settings.one_at_a_time or (settings.releases_gradients and settings.accumulate == 1):
        waiting = dict.fromkeys(order, 0)
    elif settings.accumulate > 1:  # those of the parts before stay
        waiting = dict.fromkeys(order, sum(trained for _, trained in sizes.values()))
    worst = max(order, key=lambda stack: FLOAT * waiting[stack] + peaks[stack])
    return MemoryEstimate(
        teacher=teacher,
        trained=FLOAT * resident + masks,
        gradients=FLOAT * waiting[worst],
        optimizer=optimizer_bytes(numbers, settings.optimizer),
        average=FLOAT * numbers if settings.ema_decay else 0,
        step=peaks[worst],
    )


def estimate_distill(
    transformer: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    arguments: dict[str, Any],
    settings: DistillConfig,
    precision: str = "fp32",
    processes: int = 1,
) -> dict[str, MemoryEstimate]:
    """Predict the peak of each stage of distillation that the settings ask for, in one process.

    Args:
        transformer: The teacher's, on any device, the meta device included.
        adapter: Its family.
        plan: The plan.
        arguments: A batch as one process runs it at a time.
        settings: See :class:`DistillConfig`.
        precision: ``fp32`` or ``bf16``.
        processes: How many of them train; they share the teacher's blocks under ``distill.shard_teacher``.
    """
    plan = sparse_plan(plan, settings.sparsity)
    sizes = substitute_sizes(transformer, adapter, plan)
    masks = sum(numbers for numbers, _ in sizes.values()) if settings.sparsity.zeros else 0
    teacher = weight_bytes(transformer)
    in_blocks = {s.name: [weight_bytes(b) for b in adapter.blocks(transformer, s)] for s in adapter.stacks}
    together, largest = sum(map(sum, in_blocks.values())), max(map(max, in_blocks.values()))
    streamed = teacher - together + largest
    if settings.splits_teacher(processes):
        teacher += -together + -(-together // processes) + 2 * largest  # one that arrives, and what it is copied to
    found = {}
    if sizes and settings.local_steps:
        resident = streamed if settings.offload != "none" else teacher
        peaks = local_step_bytes(transformer, adapter, arguments, sizes, precision)
        found["local"] = _local(sizes, resident, peaks, settings, masks)
    stages = {
        "alternating": settings.alternating_steps if sizes else 0,
        "output": settings.output_steps if sizes or settings.train != "substitutes" else 0,
    }
    for stage in (name for name, steps in stages.items() if steps):
        depths = {name: len(segments) for name, segments in plan.stacks.items()}
        if stage == "alternating":  # a hybrid of hardly any substitute is as deep as the teacher
            depths = {name: len(blocks) for name, blocks in in_blocks.items()}
        weights = FLOAT * sum(numbers for numbers, _ in sizes.values())
        numbers = sum(trained for _, trained in sizes.values())
        if stage == "output" and settings.train == "all":
            numbers = sum(numbers for numbers, _ in sizes.values()) + count_params(transformer)
            for name, segments in plan.stacks.items():
                blocks = adapter.blocks(transformer, _spec(adapter, name))
                gone = (i for s in segments if s.is_substitute for i in range(s.first, s.last + 1))
                numbers -= sum(count_params(blocks[i]) for i in gone)
            weights = FLOAT * numbers
        found[stage] = MemoryEstimate(
            teacher=teacher,
            trained=weights + masks,
            gradients=0,
            optimizer=optimizer_bytes(numbers, settings.optimizer),
            average=FLOAT * numbers if settings.ema_decay else 0,
            step=output_step_bytes(transformer, adapter, arguments, depths, precision, settings.checkpointing),
        )
    return found


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: of a GPU with what torch holds unused, of a CPU the free RAM."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)


_REMEDIES = {
    "local": "distill.one_at_a_time=true, distill.offload=cpu (or distill.shard_teacher on several processes), "
    "distill.optimizer=adamw8bit, or a smaller distill.batch_size",
    "alternating": "distill.alternating_steps=0, distill.checkpointing=true, distill.accumulate",
    "output": "distill.train=lora, distill.checkpointing=true, distill.optimizer=adamw8bit, distill.accumulate, "
    "distill.shard, or distill.output_steps=0",
}


def check_memory(estimates: Mapping[str, MemoryEstimate], present: int, free: int) -> None:
    """Refuse what will not fit, before anything is allocated.

    Args:
        estimates: Of each stage.
        present: Bytes of the teacher that are on the device already.
        free: What :func:`free_bytes` said.

    Raises:
        TrainingError: A stage needs more than there is.
    """
    for stage, estimate in estimates.items():
        there = min(present, estimate.teacher)
        if estimate.total - there > free:
            raise TrainingError(
                f"distill: the {stage} stage needs {size_text(estimate.total)}, {size_text(free + there)} are "
                f"there ({estimate}); set {_REMEDIES[stage]}"
            )
