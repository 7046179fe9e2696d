"""What all stages of a distillation have in common: how batches are drawn, and how a loop trains on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.devices import autocast
from ppcl.common.files import digest
from ppcl.common.streams import Stream, step_generator
from ppcl.config import DistillConfig
from ppcl.distill.compiled import BlockCompiler
from ppcl.student.masks import Masks
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.velocity import VelocityErrors
from ppcl.training.distributed import SINGLE, Group, Share
from ppcl.training.loop import TrainingLoop
from ppcl.training.losses import velocity_loss
from ppcl.training.settings import LoopSettings

HELD_OUT = 64  # states that say whether training helped
BATCHES = {  # of each stage
    "local": Stream.LOCAL_BATCH,
    "carried": Stream.CARRIED_BATCH,
    "alternating": Stream.ALTERNATING_BATCH,
    "output": Stream.OUTPUT_BATCH,
    "few_steps": Stream.FEW_STEPS_BATCH,
    "recovery": Stream.RECOVERY_BATCH,
}
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Part:
    """A piece of a step's batch that is run at once.

    Attributes:
        call: The states.
        share: What they count in the batch.
        is_last: Whether it is this process's last one of the step.
    """

    call: Call
    share: Share
    is_last: bool


@dataclass
class Recipe:
    """How a plan's substitutes are trained.

    Attributes:
        plan: The plan.
        settings: See :class:`DistillConfig`.
        seed: Fixes the batches.
        states: What is trained on.
        folder: Receives a folder of checkpoints a stage.
        device: Where training happens.
        precision: Autocast of forward passes.
        log: Receives one dict a step, with its ``stage``.
        group: The processes that train together.
        masks: Zeros that stay.
    """

    plan: CompressionPlan
    settings: DistillConfig
    seed: int
    states: States
    folder: Path
    device: torch.device
    precision: str = "auto"
    log: Log | None = None
    group: Group = SINGLE
    masks: Masks = field(default_factory=lambda: Masks({}, {}))

    def __post_init__(self) -> None:
        self._compiler = BlockCompiler(self.settings.compile)

    def fingerprint(self, stage: str, names: Collection[str]) -> str:
        """Identifies the training of some modules in a stage."""
        return digest(stage, sorted(names), self.settings.identity(), to_jsonable(self.plan.stacks), self.seed)

    @contextmanager
    def training(
        self, stage: str, modules: Mapping[str, nn.Module], steps: int, rate: float, part: str = ""
    ) -> Iterator[TrainingLoop]:
        """The loop of a stage; after it the modules' weights are their moving averages.

        Args:
            stage: Name of the stage.
            modules: By name.
            steps: Of the stage.
            rate: Peak learning rate.
            part: What of the stage this is, where modules are trained by themselves.
        """
        settings = self.settings
        loop_settings = LoopSettings(
            steps=steps,
            learning_rate=rate,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
            clip_each=stage == "local",
            ema_decay=settings.ema_decay,
            checkpoint_every=settings.checkpoint_every,
            keep_checkpoints=settings.keep_checkpoints,
            batch_size=settings.batch_size,
            max_bad_steps=min(settings.max_bad_steps, steps // 10),  # a stage of bad steps has trained nothing
            spike_factor=settings.spike_factor,
            optimizer=settings.optimizer,
            seed=self.seed,
        )
        report = self.log

        def log(row: dict[str, Any]) -> None:
            if report:
                report({"stage": f"distill.{stage}", **row})

        folder = self.folder / f"distill-{stage}" / part
        label = f"distill: {stage} {part}".rstrip()
        loop = TrainingLoop(modules, loop_settings, folder, self.fingerprint(stage, modules), log, label, self.group)
        yield loop
        loop.load_ema()

    def parts(self, stage: str, step: int, blocks: Iterable[nn.Module]) -> Iterator[Part]:
        """This process's parts of a step's batch; what is run on one is under autocast, forward and backward.

        Args:
            stage: Name of the stage, which has batches of its own.
            step: Number of the step.
            blocks: That ``distill.compile`` compiles.
        """
        stream = BATCHES[stage]
        generator = step_generator(self.seed, step, stream)
        parts = list(self.states.parts(self.settings.batch_size, generator, self.group, self.settings.accumulate))
        with self._compiler.on(blocks):
            for number, (call, share) in enumerate(parts, start=1):
                with autocast(self.device, self.precision):
                    yield Part(call, share, is_last=number == len(parts))

    def on_velocity(
        self,
        stage: str,
        modules: Mapping[str, nn.Module],
        student: nn.Module,
        steps: int,
        rate: float,
        blocks: Iterable[nn.Module],
        scale: float = 1.0,
        after: Callable[[int], None] | None = None,
    ) -> None:
        """Train modules of a student on the velocity that the teacher answered.

        It was recorded, so the teacher need not run, nor be in memory.

        Args:
            stage: Name of the stage.
            modules: By name.
            student: What they are part of.
            steps: Of the stage.
            rate: Peak learning rate.
            blocks: That ``distill.compile`` compiles.
            scale: In front of the loss.
            after: Called after each step with the number of steps that are done.
        """
        with self.training(stage, modules, steps, rate) as loop:
            for step in loop:
                for part in self.parts(stage, step, blocks):
                    output = velocity(student, to_device(part.call.arguments, self.device))
                    loss = part.share.samples * velocity_loss(output, part.call.velocity.to(self.device))
                    (scale * loss).backward()  # type: ignore[no-untyped-call]
                    loop.add({"loss": loss.item()})
                self.update(loop)
                if after:
                    after(step + 1)

    @torch.no_grad()
    def error(self, student: nn.Module, held_out: States) -> float:
        """Relative velocity error of a student on held-out states, against what the teacher answered."""
        errors = VelocityErrors()
        for call in held_out.answered(self.settings.batch_size, HELD_OUT):
            with autocast(self.device, self.precision):  # what is trained is float32, the rest may not be
                errors.add(call.velocity, velocity(student, to_device(call.arguments, self.device)))
        return errors.relative

    def update(self, loop: TrainingLoop) -> None:
        """Take the step of a loop; zeros stay zeros."""
        self.masks.hold_gradients()  # so that the optimizer's averages of them stay zero, too
        loop.step()
        self.masks.hold_weights()
