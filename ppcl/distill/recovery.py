"""Recovery of a quantised student: what stays in high precision is trained against the teacher, the rest is frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.states import States
from ppcl.config import RunConfig
from ppcl.distill.compiled import blocks_of
from ppcl.distill.recipe import Log, Recipe
from ppcl.distill.sequential import checkpoint_blocks
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import Adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """What recovery led to.

    Attributes:
        tensors: Trained weights by name, float32; empty where training led away from the teacher.
        errors: Relative velocity error on held-out states: ``distilled``, ``quantised``, ``recovered``.
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]


def recover(
    student: Any,
    adapter: Adapter,
    plan: CompressionPlan,
    weights: Mapping[str, Tensor],
    calibration: Path,
    checkpoints: Path,
    config: RunConfig,
    device: torch.device,
    precision: str,
    log: Log | None = None,
) -> Recovered:
    """Train what a quantised student keeps in high precision; resumes where it was.

    The quantised weights take part as the numbers that they stand for, so that training needs no kernel of theirs.

    Args:
        student: The distilled one, on the device; it is changed in place.
        adapter: Its family.
        plan: What it was made by.
        weights: What its quantised weights stand for, by name.
        calibration: The captured states.
        checkpoints: The folder of training states.
        config: Of the run: how batches are drawn, ``export.quantize``, ``recover_steps``, ``recover_learning_rate``.
        device: Where training happens.
        precision: Autocast of forward passes.
        log: Receives one dict a step, with its ``stage``.
    """
    settings = config.export
    recipe = Recipe(
        plan, config.distill, config.seed, States(calibration, "train"), checkpoints, device, precision, log
    )
    held_out = States(calibration, "held-out")
    errors = {"distilled": recipe.error(student, held_out)}
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    errors["quantised"] = recipe.error(student, held_out)
    if not settings.recover_steps:
        return Recovered({}, errors)
    trained = {name: parameter for name, parameter in parameters.items() if name not in weights}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if config.distill.checkpointing:
        checkpoint_blocks(student)
    modules: dict[str, nn.Module] = {settings.quantize: student}
    steps, rate = settings.recover_steps, settings.recover_learning_rate
    recipe.on_velocity("recovery", modules, student, steps, rate, [*blocks_of(adapter, student)])
    errors["recovered"] = recipe.error(student, held_out)
    if errors["recovered"] <= errors["quantised"]:
        return Recovered({name: parameter.detach() for name, parameter in trained.items()}, errors)
    logger.warning(
        "recovery led away from the teacher (velocity error %.4f before, %.4f after, held-out states): nothing of it "
        "is kept; lower export.recover_learning_rate",
        *(errors["quantised"], errors["recovered"]),
    )
    return Recovered({}, errors | {"recovered": errors["quantised"]})
