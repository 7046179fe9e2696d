"""Relative velocity error: how far a model's denoising is from the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


class VelocityErrors:
    """Sums ||v - v_teacher||^2 and ||v_teacher||^2 over states, in float64, batch by batch.

    Attributes:
        difference: The first sum.
        total: The second.
    """

    def __init__(self) -> None:
        self.difference = self.total = 0.0
        self._by_state: list[Tensor] = []  # (2, B) each

    def add(self, target: Tensor, output: Tensor) -> None:
        """Add a batch.

        Args:
            target: (B, ...), the teacher's velocity.
            output: Of the same shape, maybe on another device, the velocity that is compared.
        """
        target = target.double()
        squares = [(output.to(target.device).double() - target).pow(2), target.pow(2)]
        self.difference += float(squares[0].sum())
        self.total += float(squares[1].sum())
        self._by_state.append(torch.stack([square.flatten(1).sum(1) for square in squares]).cpu())

    @property
    def squared(self) -> float:
        """The square of :attr:`relative`."""
        return self.difference / self.total if self.total else 0.0

    @property
    def relative(self) -> float:
        """The error sqrt(sum ||v - v_teacher||^2 / sum ||v_teacher||^2); 0 where nothing was added."""
        return float(self.squared**0.5)

    def by_state(self) -> Tensor:
        """Both sums for each of N states, (2, N)."""
        return torch.cat([torch.empty(2, 0, dtype=torch.float64), *self._by_state], 1)
