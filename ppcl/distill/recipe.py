"""What all stages of a distillation have in common: how batches are drawn, and how a loop trains on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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
from ppcl.teacher.calls import Call
from ppcl.training.distributed import SINGLE, Group, Share, add_up
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings

HELD_OUT = 64  # states that say whether training helped
BATCHES = {  # of each stage
    "local": Stream.LOCAL_BATCH,
    "carried": Stream.CARRIED_BATCH,
    "alternating": Stream.ALTERNATING_BATCH,
    "output": Stream.OUTPUT_BATCH,
}
Log = Callable[[dict[str, Any]], None]
PartBackward = Callable[[Call, Share], dict[str, float]]


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
        loop: The loop that runs.
        last_part: Whether the piece of a batch that is run now is this process's last of the step.
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
    loop: TrainingLoop | None = None
    last_part: bool = False

    def __post_init__(self) -> None:
        self._compiler = BlockCompiler(self.settings.compile)

    def fingerprint(self, stage: str, names: Collection[str]) -> str:
        """Identifies the training of some modules in a stage."""
        return digest(stage, sorted(names), self.settings.identity(), to_jsonable(self.plan.stacks), self.seed)

    def train(
        self,
        stage: str,
        modules: Mapping[str, nn.Module],
        backward: Callable[[int], dict[str, float]],
        steps: int,
        rate: float,
        part: str = "",
        after: Callable[[int], None] | None = None,
    ) -> None:
        """Train modules to the end of a stage; their moving averages are their weights then.

        Args:
            stage: Name of the stage.
            modules: By name.
            backward: See :class:`TrainingLoop`.
            steps: Of the stage.
            rate: Peak learning rate.
            part: What of the stage this is, where modules are trained by themselves.
            after: See :class:`TrainingLoop`.
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
        fingerprint, report = self.fingerprint(stage, modules), self.log

        def log(row: dict[str, Any]) -> None:
            if report:
                report({"stage": f"distill.{stage}", **row})

        folder = self.folder / f"distill-{stage}" / part
        label = f"distill: {stage} {part}".rstrip()
        adjust, project = (self.masks.hold_gradients, self.masks.hold_weights) if self.masks.masks else (None, None)
        common = (modules, backward, loop_settings, folder, fingerprint, log, label, self.group)
        self.loop = TrainingLoop(*common, adjust=adjust, project=project, after=after)
        try:
            self.loop.run()
            self.loop.load_ema()
        finally:
            self.loop = None  # its optimizer goes now, not when the next loop comes

    def in_parts(self, step: int, stage: str, backward: PartBackward, blocks: Iterable[nn.Module]) -> dict[str, float]:
        """Run the backward passes of this process's parts of a step's batch; return its part of the losses.

        Args:
            step: Number of the step.
            stage: Name of the stage, which has batches of its own.
            backward: Called with each piece and its share.
            blocks: That ``distill.compile`` compiles.
        """
        stream = BATCHES[stage]
        generator = step_generator(self.seed, step, stream)
        rows: list[dict[str, float]] = []
        parts = list(self.states.parts(self.settings.batch_size, generator, self.group, self.settings.accumulate))
        with self._compiler.on(blocks):
            for call, share in parts:
                self.last_part = len(rows) + 1 == len(parts)
                with autocast(self.device, self.precision):
                    rows.append(backward(call, share))
        return add_up(rows)
