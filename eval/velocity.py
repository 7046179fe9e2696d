"""Velocity error state by state and by timestep: how far the student's denoising is from the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.common.devices import autocast
from ppcl.eval.intervals import Array, Interval, interval
from ppcl.teacher.call_arguments import batch_size, to_device
from ppcl.teacher.calls import velocity

BINS = 5
TIMESTEP_NAMES = ("timestep", "timesteps", "t")


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
        return interval(
            [self.differences, self.totals], lambda a, b, axis: np.sqrt(a.mean(axis) / np.maximum(b.mean(axis), 1e-300))
        )


def _timesteps(arguments: Mapping[str, Any], count: int) -> Array:
    for name in TIMESTEP_NAMES:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            flat = value.detach().cpu().double()
            rows = flat.reshape(count, -1).amax(1) if flat.numel() % count == 0 and flat.ndim else flat.expand(count)
            return np.asarray(rows.numpy(), dtype=np.float64)
    return np.full(count, np.nan)


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
    timesteps, differences, totals = [], [], []
    device = next(teacher.parameters()).device
    for arguments in batches:
        moved = to_device(arguments, device)
        with autocast(device, precision):
            target, found = (velocity(model, moved).double() for model in (teacher, student))
        count = batch_size(arguments)
        differences.append((found - target).square().reshape(count, -1).sum(1).cpu().numpy())
        totals.append(target.square().reshape(count, -1).sum(1).cpu().numpy())
        timesteps.append(_timesteps(arguments, count))
    return StateErrors(*(np.concatenate(parts) for parts in (timesteps, differences, totals)))


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
        chosen = StateErrors(errors.timesteps[part], errors.differences[part], errors.totals[part])
        found = chosen.error
        rows.append(
            {
                "timestep_low": float(chosen.timesteps.min()),
                "timestep_high": float(chosen.timesteps.max()),
                "states": len(part),
                "error": found.value,
                "low": found.low,
                "high": found.high,
            }
        )
    return rows
