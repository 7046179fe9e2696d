"""Distillation of a teacher whose blocks are read one by one: two of them are in memory, and one substitute.

What trains a substitute by itself is done here: the local stage, one at a time, and carried recovery. What needs the
whole student with gradients (alternating and output stage) is left out, and said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.files import remove
from ppcl.common.progress import announce
from ppcl.common.tensor_files import read_tensors
from ppcl.config import DistillConfig
from ppcl.distill.carried import CarriedRecovery
from ppcl.distill.one_at_a_time import OneAtATime
from ppcl.distill.recipe import Log, Recipe
from ppcl.distill.run_by_run import RunByRun
from ppcl.errors import ConfigError
from ppcl.student.assembly import RunKey
from ppcl.student.bundle import members, save_stored_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import fitted_tensors, new_substitute, width_tensors
from ppcl.teacher.blocks import Blocks
from ppcl.training.distributed import SINGLE, Group


def left_out(settings: DistillConfig) -> dict[str, int]:
    """The stages that need the whole student in memory, with their steps."""
    steps = {"alternating": settings.alternating_steps, "output": settings.output_steps}
    return {stage: count for stage, count in steps.items() if count}


def check_streamed(settings: DistillConfig) -> None:
    """Refuse what a user asked for and a streamed teacher cannot give.

    Raises:
        ConfigError: There is such a setting.
    """
    if settings.not_streamed:
        raise ConfigError(
            f"{', '.join(settings.not_streamed)} needs the whole model in memory, and the teacher's blocks are "
            "streamed; leave it out, or set blocks=resident"
        )


def distill_streamed(
    source: Blocks,
    plan: CompressionPlan,
    calibration: Path,
    out: Path,
    settings: DistillConfig,
    seed: int,
    precision: str = "auto",
    log: Log | None = None,
    group: Group = SINGLE,
) -> None:
    """Train a plan's substitutes, and write ``out/bundle``; goes on where it was.

    Args:
        source: The teacher's blocks.
        plan: The plan.
        calibration: The captured states.
        out: The run directory.
        settings: See :class:`DistillConfig`. ``keep_start`` is decided for each substitute, by its state loss on
            held-out states.
        seed: Fixes the batches.
        precision: Autocast of forward passes.
        log: Receives one dict a step, with its ``stage``.
        group: The processes that share the work; each trains other substitutes.

    Raises:
        ConfigError: A setting needs the whole model.
    """
    check_streamed(settings)
    skipped = left_out(settings)
    if skipped and group.is_main:
        stages = ", ".join(f"{stage} stage ({count} steps)" for stage, count in skipped.items())
        announce(f"distill: left out, since it needs the whole student in memory and blocks are streamed: {stages}")
    states = States(calibration, "train")
    has_held_out = (settings.keep_start or settings.correct) and any(calibration.glob("held-out-*"))
    recipe = Recipe(plan, settings, seed, states, out / "checkpoints", source.device, precision, log, group)
    held_out = States(calibration, "held-out") if has_held_out else None
    starts, runs = Starts(source, plan, out, settings), [run for run, _ in members(plan)]
    lora: dict[str, Tensor] = {}
    stage: RunByRun = (local := OneAtATime(recipe, source, starts, held_out))
    if not (runs and settings.walks):
        local.run(runs)
    else:

        def load(run: RunKey) -> nn.Module:
            block = starts(run)
            if local.path(run).is_file():  # until carried recovery is finished with it
                block.load_state_dict(read_tensors(local.path(run))[0])
            return block

        stage = (carried := CarriedRecovery(recipe, source, load, held_out, lambda run: remove(local.path(run))))
        local.run([run for run in runs if not carried.is_finished(run)])
        carried.run(runs)
        lora = carried.factors()
    how: dict[str, Any] = {"distill": to_jsonable(settings.model_dump()), "left_out": sorted(skipped)}
    group.on_main(lambda: save_stored_bundle(plan, stage.path, out / "bundle", how, lora))
    group.barrier()


class Starts:
    """Makes substitutes, untrained, one when it is asked for; of the files that they start from no more is read.

    Args:
        source: The teacher's blocks.
        plan: The plan.
        out: The run directory, with what the stages before wrote.
        settings: Whether fitted candidates count.
    """

    def __init__(self, source: Blocks, plan: CompressionPlan, out: Path, settings: DistillConfig) -> None:
        self.source, self.segments = source, dict(members(plan))
        self.fitted = fitted_tensors(out / "candidates.safetensors" if settings.from_fit else None)
        self.closed_forms = width_tensors(out / "analysis.safetensors") if plan.has_width else {}

    def __call__(self, run: RunKey) -> nn.Module:
        """The untrained substitute of a run, on the device."""
        stack = self.source.stacks[run[0]]
        blocks = self.source.copies(run[0])
        block = new_substitute(blocks, stack, self.segments[run], self.fitted, self.closed_forms)
        return block.to(self.source.device)
