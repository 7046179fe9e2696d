"""Velocity error state by state and by timestep: how far the student's denoising is from the teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ppcl.common.devices import autocast
from ppcl.eval.intervals import Array, Interval, interval
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.velocity import VelocityErrors

BINS = 5


@dataclass(frozen=True)
class StateErrors:
    """Velocity errors of N states.

    Attributes:
        timesteps: (N,) as the transformer gets them (0-1 or 0-1000, by family); NaN where it gets none.
        differences: (N,) ||v_s - v_t||^2.
        totals: (N,) ||v_t||^2.
    """

    timesteps: Array
    differences: Array
    totals: Array

    @property
    def error(self) -> Interval:
        """The relative error sqrt(sum ||v_s - v_t||^2 / sum ||v_t||^2) with its interval over states."""
        return error_interval(self.differences, self.totals)


def error_interval(differences: Array, totals: Array) -> Interval:
    """The relative error with its bootstrap interval over states, see :meth:`VelocityErrors.by_state`."""
    return interval([differences, totals], lambda a, b, axis: np.sqrt(a.mean(axis) / np.maximum(b.mean(axis), 1e-300)))


@torch.no_grad()
def state_errors(
    teacher: nn.Module, student: nn.Module, batches: Iterable[dict[str, Any]], precision: str = "fp32"
) -> StateErrors:
    """Compare two transformers on recorded states.

    Args:
        teacher: Its velocity is the truth.
        student: Takes the same arguments.
        batches: As :meth:`ppcl.capture.states.States.batches` yields them.
        precision: Autocast of the passes; ``fp32`` runs both as they are.
    """
    timesteps, errors = [], VelocityErrors()
    device = next(teacher.parameters()).device
    for arguments in batches:
        moved = to_device(arguments, device)
        with autocast(device, precision):
            errors.add(velocity(teacher, moved), velocity(student, in_dtype_of(moved, teacher, student)))
        timesteps.append(np.asarray(trees.timesteps(arguments)))
    return StateErrors(np.concatenate(timesteps), *errors.by_state().numpy())


def in_dtype_of(arguments: dict[str, Any], teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """Arguments for a student whose dtype is another one than the teacher's (quantised ones calculate in bfloat16)."""
    dtype = getattr(student, "dtype", None)
    if dtype is None or dtype == getattr(teacher, "dtype", None):
        return arguments
    cast: dict[str, Any] = trees.to_dtype(arguments, dtype)
    return cast


def by_timestep(errors: StateErrors, bins: int = BINS) -> list[dict[str, Any]]:
    """The error in equally filled bins of the timestep, from much noise to little.

    Returns:
        For each bin ``timestep_low``, ``timestep_high``, ``states``, ``error`` and its limits ``low`` and
        ``high``; empty where the transformer is told no timestep.
    """
    if not len(errors.timesteps) or np.isnan(errors.timesteps).any():
        return []
    order = np.argsort(-errors.timesteps, kind="stable")
    rows = []
    for part in np.array_split(order, min(bins, len(np.unique(errors.timesteps)))):
        timesteps, error = errors.timesteps[part], error_interval(errors.differences[part], errors.totals[part])
        rows.append(
            {
                "timestep_low": float(timesteps.min()),
                "timestep_high": float(timesteps.max()),
                "states": len(part),
                "error": error.value,
                "low": error.low,
                "high": error.high,
            }
        )
    return rows
