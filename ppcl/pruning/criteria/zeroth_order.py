"""The size of a gradient from function values alone (ECoFLaP, Sung et al. 2023, arXiv 2310.02998).

For z of independent standard normals, L(W + eps z) - L(W - eps z) is 2 eps <g, z> to second order, and the mean of
|<g, z>| is sqrt(2/pi) ||g||. So forward passes say how much a block matters where its gradient would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gradient_norm(
    loss: Callable[[], float],
    tensors: Sequence[Tensor],
    generator: torch.Generator,
    epsilon: float = 1e-3,
    draws: int = 1,
) -> float:
    """Estimate ||dL/dW||, two evaluations a draw.

    The loss must be the same function in both: its states, timesteps and noise are fixed. The weights are copied
    and put back, since adding and subtracting the same again drifts, in half precision by a lot.

    Args:
        loss: Reads the tensors as they are now.
        tensors: W, in one or several parts; moved in place, and as they were afterwards.
        generator: On the CPU, for z.
        epsilon: How far they are moved.
        draws: Directions z; the standard error of the estimate is 0.76 ||g|| / sqrt(draws).

    Returns:
        sqrt(pi / 2) times the mean of |L(W + eps z) - L(W - eps z)| / (2 eps).
    """
    kept = [tensor.clone() for tensor in tensors]
    total = 0.0
    try:
        for _ in range(draws):
            moves = [epsilon * torch.randn(t.shape, generator=generator).to(t.device) for t in tensors]
            values = []
            for sign in (1, -1):
                for tensor, start, move in zip(tensors, kept, moves, strict=True):
                    tensor.copy_(start + sign * move)
                values.append(loss())
            total += abs(values[0] - values[1]) / (2 * epsilon)
    finally:
        for tensor, start in zip(tensors, kept, strict=True):
            tensor.copy_(start)
    return math.sqrt(math.pi / 2) * total / draws
