"""Random numbers: one generator a purpose, a step and a picture, so that nothing depends on what ran before."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def seeds(seed: int, count: int, device: torch.device | str = "cpu") -> Iterator[torch.Generator]:
    """One generator an image, so that batch size does not change a picture's noise."""
    for index in range(count):
        yield torch.Generator(device).manual_seed(seed * 1_000_003 + index)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone."""
    mixed = (seed * 1_000_003 + step) * 8_191 + stream
    return torch.Generator().manual_seed(mixed % (2**63 - 1))
