"""Pictures of one caption that differ: place, size, mirror image, a small turn, the ground's tint.

None of it is in the caption, so a teacher has to draw it from its noise, and what a student
loses of that variety can be measured. Everything comes from a generator: in training from that
of the step, elsewhere from (seed, caption), so that a picture does not depend on which others
are asked for. The ranges are gentle: wider ones need several times the training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl.emoji.data import GROUNDS, SIZE, TILE, Pair, load_emoji, load_tiles

SCALE = (0.8, 1.0)  # side of the emoji by that of the picture
TURN = 0.1  # radians to either side
TINT = 8 / 255  # standard deviation of each colour of the ground
ONE_HANDED = ("-thirty", "o'clock")  # a mirrored clock shows another time, so another caption


@dataclass(frozen=True)
class Variation:
    """How B pictures differ from the plain ones of their captions.

    Attributes:
        scale: (B,) side of the emoji by that of the picture.
        turn: (B,) radians.
        mirrored: (B,) bool.
        place: (B, 2) centre (x, y) of the emoji, -1 to 1 of the room that its size leaves.
        tint: (B, 3) added to the ground's colours, which are in [0, 1].
    """

    scale: Tensor
    turn: Tensor
    mirrored: Tensor
    place: Tensor
    tint: Tensor

    @classmethod
    def draw(cls, count: int, generator: torch.Generator) -> Variation:
        """Draw the variation of ``count`` pictures."""
        scale, turn, mirror, *place = torch.rand(5, count, generator=generator)
        return cls(
            scale=SCALE[0] + (SCALE[1] - SCALE[0]) * scale,
            turn=TURN * (2 * turn - 1),
            mirrored=mirror < 0.5,
            place=2 * torch.stack(place, 1) - 1,
            tint=TINT * torch.randn(count, 3, generator=generator),
        )

    def __getitem__(self, part: slice) -> Variation:
        """The variation of some of the pictures."""
        return Variation(*(getattr(self, field.name)[part] for field in fields(self)))

    @classmethod
    def of(cls, pairs: Sequence[Pair], seed: int) -> Variation:
        """Return the variation that a seed gives each pair, whatever the other pairs."""
        rows = []
        for pair in pairs:
            hashed = hashlib.sha256(f"{seed} {pair.caption}".encode()).digest()
            rows.append(cls.draw(1, torch.Generator().manual_seed(int.from_bytes(hashed[:7], "big"))))
        return cls(*(torch.cat([getattr(row, field.name) for row in rows]) for field in fields(cls)))


class Sprites:
    """The bare emoji and the colours of the grounds of some pairs, ready to be drawn in many ways."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        bare = torch.from_numpy(load_tiles(TILE)).permute(0, 3, 1, 2).float() / 255
        self.tiles = torch.cat([bare[:, :3] * bare[:, 3:], bare[:, 3:]], 1)  # (N, 4, TILE, TILE), colour times alpha
        colours = torch.tensor(list(GROUNDS.values())) / 255
        self.tile = torch.tensor([pair.tile for pair in pairs])
        self.ground = colours[[list(GROUNDS).index(pair.ground) for pair in pairs]]
        two_handed = torch.tensor([not emoji.name.endswith(ONE_HANDED) for emoji in load_emoji()])
        self.may_mirror = two_handed[self.tile]

    def draw(self, indices: Tensor, variation: Variation, size: int = SIZE) -> Tensor:
        """Draw pairs.

        Args:
            indices: (B,) places of the pairs.
            variation: Of the B pictures.
            size: Pixels of a side.

        Returns:
            (B, 3, size, size) in [-1, 1].
        """
        tiles = self.tiles[self.tile[indices]]
        scale = variation.scale
        side = torch.where(variation.mirrored & self.may_mirror[indices], -1.0, 1.0)
        cos, sin = variation.turn.cos() / scale, variation.turn.sin() / scale
        turned = torch.stack([side * cos, side * sin, -sin, cos], 1).view(-1, 2, 2)  # picture to tile
        centre = variation.place * (1 - scale)[:, None]
        theta = torch.cat([turned, -turned @ centre[:, :, None]], 2)
        shape = [len(tiles), 4, 2 * size, 2 * size]  # twice as fine, then averaged: no jagged outlines
        grid = F.affine_grid(theta, shape, align_corners=False)
        moved = F.avg_pool2d(F.grid_sample(tiles, grid, align_corners=False), 2)  # transparent outside
        ground = (self.ground[indices] + variation.tint).clamp(0, 1)
        return (moved[:, :3] + (1 - moved[:, 3:]) * ground[:, :, None, None]).clamp(0, 1) * 2 - 1


def load_varied_pictures(pairs: Sequence[Pair], seed: int, size: int = SIZE) -> np.ndarray:
    """Return one varied picture a pair, (N, size, size, 3) uint8: the same for a seed, others for another."""
    sprites, variation = Sprites(pairs), Variation.of(pairs, seed)
    pictures = sprites.draw(torch.arange(len(pairs)), variation, size)
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
