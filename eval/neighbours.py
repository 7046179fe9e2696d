"""Fidelity and variety apart: precision, recall, density and coverage from nearest neighbours.

Precision and recall as in Kynkaanniemi et al. 2019, density and coverage as in Naeem et al.
2020. Distances are formed in slabs, so memory grows with the number of pictures, not with its
square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.eval.set_distances import slabs

NEIGHBOURS = 5  # both papers' choice for their tables


@dataclass(frozen=True)
class Manifold:
    """The four measures, one value an item; each measure is the mean of its items.

    Attributes:
        precision: (N,) 1 for a drawn picture inside the real pictures' manifold.
        density: (N,) number of real pictures' balls that hold a drawn picture, over k.
        recall: (M,) 1 for a real picture inside the drawn pictures' manifold.
        coverage: (M,) 1 for a real picture that has a drawn one within its ball.
    """

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def radii(features: Tensor, k: int) -> Tensor:
    """Distance of every item to its k-th nearest neighbour, (N,)."""
    # the item itself is the nearest one, at distance 0
    distances = [torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in slabs(features, len(features))]
    return torch.cat(distances)


def manifold(features: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> Manifold:
    """Compare two sets by their nearest neighbours.

    Args:
        features: (N, D) of drawn pictures.
        reference: (M, D) of real ones.
        k: Neighbours that span a ball.

    Raises:
        UserError: A side has no more than k pictures.
    """
    x, y = features.detach().cpu().double(), reference.detach().cpu().double()
    if min(len(x), len(y)) <= k:
        raise UserError(
            f"precision and recall need more than {k} pictures on both sides, got {len(x)} and {len(y)}; give more"
        )
    drawn_radii, real_radii = radii(x, k), radii(y, k)
    recall, nearest = torch.zeros(len(y), dtype=torch.bool), torch.full((len(y),), torch.inf, dtype=torch.float64)
    density = []
    start = 0
    for part in slabs(x, len(y)):
        distance = torch.cdist(part, y)  # (drawn, real)
        density.append((distance < real_radii).double().sum(1) / k)
        recall |= (distance < drawn_radii[start : start + len(part), None]).any(0)
        nearest = torch.minimum(nearest, distance.min(0).values)
        start += len(part)
    held = torch.cat(density)
    return Manifold((held > 0).double(), held, recall.double(), (nearest < real_radii).double())
