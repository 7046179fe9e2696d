"""How much memory a training step will take, before anything large is allocated.

Everything that lives throughout is counted from shapes: the teacher's weights as far as they are on the device, and
for each trained number its weight, gradient, optimizer state and moving average. What a step allocates beyond that
(activations, the teacher's working set, temporaries) follows no simple formula, so the step itself is run on fake
tensors (shapes and dtypes, no numbers; :class:`torch._subclasses.FakeTensorMode`), and every storage that an operator
makes is counted while it lives. Teacher, substitutes and student are built on the meta device by the functions that
build them for training, and nothing is changed in a module once its tensors are fake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ppcl.common.devices import autocast
from ppcl.common.tables import size_text
from ppcl.config import DistillConfig
from ppcl.distill.fake import bare_copy, fake_tree, lasting_tensors, simulated_peak
from ppcl.distill.local import local_losses
from ppcl.distill.trainable import thawed, with_factors
from ppcl.errors import TrainingError
from ppcl.pruning.sparsity import sparse_plan
from ppcl.student.assembly import RunKey, assemble_student, substitute_block, with_blocks
from ppcl.student.bundle import members
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.flops import count_params
from ppcl.training.distributed import SINGLE
from ppcl.training.losses import velocity_loss

STREAMED = "streamed local"
FLOAT = 4  # bytes of a trained number: substitutes are float32 whatever the teacher is


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step at its peak, on the device that trains.

    Attributes:
        teacher: Weights of the frozen model that are there.
        trained: The substitutes and what else the student has for itself, and a byte for each number that may be zero.
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


def trained_params(module: nn.Module) -> int:
    """Numbers in a module that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def optimizer_bytes(numbers: int, kind: str) -> int:
    """Bytes of the optimizer's states for so many trained numbers.

    Args:
        numbers: Trained numbers.
        kind: ``adamw`` (two float32) or ``adamw8bit`` (two bytes, and a float32 scale for each 256 of both).
    """
    return 2 * FLOAT * numbers if kind == "adamw" else 2 * numbers + 2 * FLOAT * numbers // 256


def bare_substitutes(transformer: nn.Module, adapter: Adapter, plan: CompressionPlan) -> dict[RunKey, nn.Module]:
    """The substitutes of a plan as training builds them, without numbers.

    Args:
        transformer: The teacher's, on the meta device.
        adapter: Its family.
        plan: The plan.

    Returns:
        Blocks on the meta device, in the order in which a pass comes to them.
    """
    return {
        (spec.name, segment.first, segment.last): substitute_block(adapter.blocks(transformer, spec), segment).float()
        for spec in adapter.stacks
        for segment in plan.stacks[spec.name]
        if segment.is_substitute
    }


def local_step_bytes(
    transformer: nn.Module,
    adapter: Adapter,
    arguments: dict[str, Any],
    substitutes: Mapping[RunKey, nn.Module],
    precision: str,
) -> dict[RunKey, int]:
    """What a local step of each substitute allocates at most; of alike ones one is run.

    Of the teacher two blocks of the stack run, as at the end of any run: blocks before them leave nothing behind.

    Args:
        transformer: The teacher's, on any device.
        adapter: Its family.
        arguments: A batch of states.
        substitutes: See :func:`bare_substitutes`.
        precision: ``fp32`` or ``bf16``.
    """
    # a mean over valid tokens has a size that depends on numbers; one over all tokens takes no less memory
    unmasked = replace(adapter, stacks=tuple(replace(spec, masks={}) for spec in adapter.stacks))
    peaks: dict[RunKey, int] = {}
    alike: dict[Any, int] = {}
    for run, block in substitutes.items():
        stack, first, last = run
        lists = {s.name: list(adapter.blocks(transformer, s))[:1] for s in adapter.stacks}
        lists[stack] = list(adapter.blocks(transformer, _spec(adapter, stack)))[first : min(first + 2, last + 1)]
        short = (stack, 0, len(lists[stack]) - 1)
        shapes = (stack, *(_shapes(module) for module in (*lists[stack], block)))
        if shapes not in alike:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            teacher, trained = bare_copy(with_blocks(transformer, lists), fake), {short: bare_copy(block, fake)}
            with fake:
                batch = fake_tree(arguments)

                def step(teacher: nn.Module = teacher, batch: Any = batch, trained: Any = trained) -> None:
                    with autocast(torch.device("cpu"), precision):
                        local_losses(teacher, unmasked, batch, trained)

                alike[shapes] = simulated_peak(step, teacher, *trained.values())
        peaks[run] = alike[shapes]
    return peaks


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    """What tells modules apart in memory."""
    return tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters())


def output_step_bytes(student: nn.Module, arguments: dict[str, Any], precision: str, checkpointing: bool) -> int:
    """What a step through a whole student allocates at most, with the gradients of all that is trained in it.

    Args:
        student: On any device; its trained weights ask for gradients.
        arguments: A batch of states.
        precision: ``fp32`` or ``bf16``.
        checkpointing: Blocks are run again in the backward pass.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copied: Any = bare_copy(student, fake)
    if checkpointing:
        copied.enable_gradient_checkpointing()
    with fake:
        batch = fake_tree(arguments)

        def step() -> None:
            with autocast(torch.device("cpu"), precision):
                output = velocity(copied, batch)
            velocity_loss(output, torch.empty_like(output)).backward()  # type: ignore[no-untyped-call]

        return simulated_peak(step, copied)


def output_student(
    transformer: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    substitutes: Mapping[RunKey, nn.Module],
    settings: DistillConfig,
) -> Any:
    """The student as the output stage trains it; see :func:`ppcl.distill.trainable.thawed`."""
    student = assemble_student(transformer, adapter, plan, substitutes)
    if settings.train == "all":
        return thawed(student, adapter, substitutes, SINGLE)
    if settings.train == "lora":
        return with_factors(student, adapter, plan, settings.lora_rank, torch.Generator())
    return student


def _spec(adapter: Adapter, name: str) -> StackSpec:
    return next(spec for spec in adapter.stacks if spec.name == name)


def correction_bytes(block: nn.Module, spec: StackSpec) -> int:
    """What :mod:`ppcl.distill.correction` holds at most: sums of a layer a stream, and what solving one takes."""
    sizes = [(m.in_features + 1, m.out_features) for m in block.modules() if isinstance(m, nn.Linear)]
    largest = max((size * (size + outputs) for size, outputs in sizes), default=0)
    return 2 * FLOAT * (len(spec.outputs) + 2) * largest


def _carried(
    adapter: Adapter,
    substitutes: Mapping[RunKey, nn.Module],
    teacher: int,
    peaks: Mapping[RunKey, int],
    settings: DistillConfig,
    masks: int,
) -> MemoryEstimate:
    """The carried walk: a substitute at a time is trained, or corrected, whichever takes more."""
    estimate = _local(substitutes, teacher, peaks, settings.model_copy(update={"one_at_a_time": True}), masks)
    if settings.correct:
        sums = max(correction_bytes(block, _spec(adapter, run[0])) for run, block in substitutes.items())
        corrected = replace(estimate, optimizer=0, average=0, step=estimate.step + sums)
        if corrected.total > estimate.total or not settings.carried_steps:
            estimate = corrected
    trained = sum(map(weight_bytes, substitutes.values())) + masks
    return estimate if settings.one_at_a_time else replace(estimate, trained=trained)


def _local(
    substitutes: Mapping[RunKey, nn.Module],
    teacher: int,
    peaks: Mapping[RunKey, int],
    settings: DistillConfig,
    masks: int,
) -> MemoryEstimate:
    """The local stage, from its substitutes and what a step of each allocates."""
    join = max if settings.one_at_a_time else sum
    trained = {run: trained_params(block) for run, block in substitutes.items()}
    numbers = join(trained.values())
    order = list(substitutes)
    # the gradients of all substitutes before one may be waiting for the step
    waiting = {run: sum(trained[before] for before in order[:index]) for index, run in enumerate(order)}
    if settings.one_at_a_time or (settings.releases_gradients and settings.accumulate == 1):
        waiting = dict.fromkeys(order, 0)
    elif settings.accumulate > 1:  # those of the parts before stay
        waiting = dict.fromkeys(order, sum(trained.values()))
    worst = max(order, key=lambda run: FLOAT * waiting[run] + peaks[run])
    return MemoryEstimate(
        teacher=teacher,
        trained=join(weight_bytes(block) for block in substitutes.values()) + masks,
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
    bare: Any = bare_copy(transformer)
    substitutes = bare_substitutes(bare, adapter, plan)
    masks = sum(map(count_params, substitutes.values())) if settings.sparsity.zeros else 0
    teacher = weight_bytes(bare)
    in_blocks = {s.name: [weight_bytes(b) for b in adapter.blocks(bare, s)] for s in adapter.stacks}
    together, largest = sum(map(sum, in_blocks.values())), max(map(max, in_blocks.values()))
    streamed = teacher - together + largest
    if settings.splits_teacher(processes):
        teacher += -together + -(-together // processes) + 2 * largest  # one that arrives, and what it is copied to
    found = {}
    if substitutes and (settings.local_steps or settings.walks):
        resident = streamed if settings.offload != "none" else teacher
        peaks = local_step_bytes(bare, adapter, arguments, substitutes, precision)
        if settings.local_steps:
            found["local"] = _local(substitutes, resident, peaks, settings, masks)
        if settings.walks:
            found["carried"] = _carried(adapter, substitutes, resident, peaks, settings, masks)
    resident = sum(map(weight_bytes, substitutes.values()))
    if substitutes and settings.alternating_steps:
        # a hybrid of hardly any substitute is as deep as the teacher
        deepest = thawed(bare, adapter, {}, SINGLE)
        step = output_step_bytes(deepest, arguments, precision, settings.checkpointing)
        numbers = sum(map(trained_params, substitutes.values()))
        found["alternating"] = _whole(teacher, resident + masks, numbers, step, settings)
    asked = {"output": settings.output_steps, "few_steps": settings.few_steps.num_inference_steps}
    if any(asked.values()) and (substitutes or settings.train != "substitutes"):
        student = output_student(bare, adapter, plan, substitutes, settings)
        step = output_step_bytes(student, arguments, precision, settings.checkpointing)
        shared = set(map(id, lasting_tensors(bare)))
        own = {id(t): t.numel() * t.element_size() for t in lasting_tensors(student) if id(t) not in shared}
        resident = sum(own.values())
        estimate = _whole(teacher, resident + masks, trained_params(student), step, settings)
        found |= {stage: estimate for stage, steps in asked.items() if steps}
    return found


def estimate_streamed(
    transformer: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    arguments: dict[str, Any],
    settings: DistillConfig,
    precision: str = "fp32",
) -> dict[str, MemoryEstimate]:
    """Predict the peak of the local stage where two of the teacher's blocks are in memory, and one substitute.

    Of the plan's substitutes one of each kind is looked at. Arguments as of :func:`estimate_distill`.
    """
    bare: Any = bare_copy(transformer)
    blocks = {spec.name: adapter.blocks(bare, spec) for spec in adapter.stacks}
    kinds: dict[Any, tuple[str, Segment]] = {}
    for (stack, _, _), segment in members(plan):
        shapes = [_shapes(block) for block in blocks[stack][segment.first : segment.first + 2]]
        start = _shapes(blocks[stack][start_index(segment.first, segment.last, segment.start)])
        key = (stack, segment.is_run, repr(sorted(segment.width.items())), *shapes, start)
        kinds.setdefault(key, (stack, segment))
    stacks = {name: tuple(segment for stack, segment in kinds.values() if stack == name) for name in plan.stacks}
    alone = settings.model_copy(update={"one_at_a_time": True, "output_steps": 0, "alternating_steps": 0})
    alone = alone.model_copy(update={"offload": "cpu"})  # which has one block there
    found = estimate_distill(bare, adapter, replace(plan, stacks=stacks), arguments, alone, precision)
    ahead = max(weight_bytes(block) for stack in blocks.values() for block in stack)
    # carried recovery trains as the local stage does
    local = found.get("local") or found.get("carried")
    return {STREAMED: replace(local, teacher=local.teacher + ahead)} if local else {}


def _whole(teacher: int, trained: int, numbers: int, step: int, settings: DistillConfig) -> MemoryEstimate:
    """A stage that trains so many numbers through a whole student."""
    return MemoryEstimate(
        teacher=teacher,
        trained=trained,
        gradients=0,
        optimizer=optimizer_bytes(numbers, settings.optimizer),
        average=FLOAT * numbers if settings.ema_decay else 0,
        step=step,
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: of a GPU with what torch holds unused, of a CPU the free RAM."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)


_REMEDIES = {
    STREAMED: "distill.optimizer=adamw8bit, distill.accumulate, or a smaller distill.batch_size",
    "local": "distill.one_at_a_time=true, distill.offload=cpu (or distill.shard_teacher on several processes), "
    "distill.optimizer=adamw8bit, or a smaller distill.batch_size",
    "carried": "distill.carried_steps=0, distill.offload=cpu, distill.optimizer=adamw8bit, or a smaller "
    "distill.batch_size",
    "alternating": "distill.alternating_steps=0, distill.checkpointing=true, distill.accumulate",
    "output": "distill.train=lora, distill.checkpointing=true, distill.optimizer=adamw8bit, distill.accumulate, "
    "distill.shard, or distill.output_steps=0",
    "few_steps": "distill.train=lora, distill.checkpointing=true, distill.optimizer=adamw8bit, or distill.accumulate",
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
