"""Losses on block states and on the velocity. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-12


def direction(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's eq. 6: ||s/|s| - t/|t| ||^2 of each token.

    Args:
        student: (..., d) states.
        teacher: (..., d) states.

    Returns:
        (...) losses in [0, 4].
    """
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return (student - teacher).pow(2).sum(-1)


def normalized(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error relative to the teacher's norm, ||s - t||^2 / |t|^2 of each token.

    With r = |s|/|t| it equals (r - 1)^2 + r * direction(s, t): eq. 6 plus the relative
    magnitude that eq. 6 ignores, although the residual stream is sensitive to scale.

    Args:
        student: (..., d) states.
        teacher: (..., d) states.

    Returns:
        (...) losses, 0 or more.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1).clamp_min(_EPSILON)


STATE_LOSSES = {"normalized": normalized, "direction": direction}


def state_loss(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    masks: dict[str, Tensor],
    kind: str = "normalized",
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    """Mean token loss of each stream, averaged over the streams.

    Args:
        student: Stream states, (B, tokens, d) each.
        teacher: The same of the teacher.
        masks: Valid tokens (B, tokens) of streams that have padding.
        kind: ``normalized`` or ``direction``.
        weights: What each stream's mean counts in a part of a batch (:class:`ppcl.training.distributed.Share`).

    Returns:
        A scalar.
    """
    losses = []
    weights = weights or {}
    for stream, target in teacher.items():
        token = STATE_LOSSES[kind](student[stream], target.detach())
        valid = token[masks[stream].bool()] if stream in masks else token
        mean = valid.mean() if valid.numel() else valid.sum()  # a part of a batch may be all padding
        losses.append(weights.get(stream, 1.0) * mean)
    return torch.stack(losses).mean()


def velocity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared velocity error relative to the teacher's, averaged over samples (B, ...)."""
    student, teacher = student.float().flatten(1), teacher.detach().float().flatten(1)
    return ((student - teacher).pow(2).sum(1) / teacher.pow(2).sum(1).clamp_min(_EPSILON)).mean()
