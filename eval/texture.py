"""How pictures are drawn, whatever they show: statistics of fine detail, and a distance between two sets of them.

A network that was trained to name things overlooks what pruning spoils first: softer edges, lost
grain, detail in the wrong place. So each picture is taken apart into the levels of a Laplacian
pyramid (Burt & Adelson 1983), as the sliced Wasserstein distance of Karras et al. (2018) does,
and described by statistics of Portilla & Simoncelli (2000): how strong each level is, how sparse,
and whether it is strong where the next coarser one is. The Frechet distance between two sets of
these needs no network, sees what people overlook (docs/metric_sanity.md), and settles with few
pictures, for it has a few dozen numbers a picture and not thousands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl.errors import UserError
from ppcl.eval.fid import FeatureStatistics, frechet_distance
from ppcl.eval.set_distances import Distance, frechet_items

SMALLEST = 12  # pixels of a side of the coarsest level, at least
MAX_LEVELS = 5  # what is coarser than this is composition, not texture
SOFT = 0.5  # grey levels: weaker than this is nothing
_BINOMIAL = torch.tensor([1.0, 4, 6, 4, 1]) / 16
# lightness, red against green, yellow against blue
_OPPONENTS = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, -1 / 2, 0], [1 / 4, 1 / 4, -1 / 2]])


def num_levels(side: int) -> int:
    """Levels of pictures whose shorter side has so many pixels; none of very small ones."""
    levels = 0
    while side >= SMALLEST and levels < MAX_LEVELS:
        levels, side = levels + 1, side // 2
    return levels


def _smooth(pictures: Tensor) -> Tensor:
    channels = pictures.shape[1]
    kernel = torch.outer(_BINOMIAL, _BINOMIAL).to(pictures).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(pictures, [2] * 4, mode="reflect"), kernel, groups=channels)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation over places of (N, C, H, W) strengths; (N, C), near 0 where either hardly varies."""
    a, b = (x - x.mean((2, 3), keepdim=True) for x in (first, second))
    deviations = (a.square().mean((2, 3)) * b.square().mean((2, 3))).sqrt()
    return (a * b).mean((2, 3)) / (deviations + SOFT**2)


def texture_features(images: Tensor) -> Tensor:
    """Describe pictures by statistics of their fine detail.

    Args:
        images: (N, 3, H, W) uint8.

    Returns:
        (N, 9 L - 3) float32 for L levels: of each level and colour the logarithms of its strength and of its
        sparseness, and of each but the first the correlation of its strength with that of the level before.

    Raises:
        ValueError: They are not such pictures, or too small (see :func:`num_levels`).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"pictures must be (N, 3, H, W) uint8 with N > 0, got {tuple(images.shape)} {images.dtype}")
    levels = num_levels(min(images.shape[-2:]))
    if not levels:
        raise ValueError(f"texture needs pictures of at least {SMALLEST} pixels, got {tuple(images.shape[-2:])}")
    rest = torch.einsum("oc,nchw->nohw", _OPPONENTS, images.cpu().float())
    statistics: list[Tensor] = []
    finer: Tensor | None = None
    for _ in range(levels):
        low = _smooth(rest)
        strength = (rest - low).abs()
        rms = strength.square().mean((2, 3)).sqrt() + SOFT
        statistics += [rms.log(), ((strength.mean((2, 3)) + SOFT) / rms).log()]
        if finer is not None:
            height, width = strength.shape[-2:]
            statistics.append(_correlation(F.adaptive_avg_pool2d(finer, (height, width)), strength))
        finer, rest = strength, low[:, :, ::2, ::2]
    return torch.cat(statistics, 1)


def texture_distance(features: Tensor, reference: Tensor) -> Distance:
    """Frechet distance between two sets, each statistic in standard deviations of the second set.

    Args:
        features: (N, D) from :func:`texture_features`, N > 1.
        reference: (M, D) of pictures of the same size, M > 1.

    Raises:
        UserError: A set has fewer than two pictures.
    """
    if min(len(features), len(reference)) < 2:
        raise UserError(
            f"a texture distance needs at least 2 pictures on both sides, got {len(features)} and {len(reference)}; "
            "give more prompts"
        )
    mean, deviation = reference.double().mean(0), reference.double().std(0).clamp(min=1e-3)
    ours, theirs = ((part.double() - mean) / deviation for part in (features, reference))
    first, second = FeatureStatistics(), FeatureStatistics()
    first.update(ours)
    second.update(theirs)
    value = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    return Distance(value, frechet_items(ours, second.mean, second.covariance, value))


class TextureExtractor:
    """:func:`texture_features` as an extractor of features; it knows no text."""

    name = "texture"

    def image_features(self, images: Tensor) -> Tensor:
        """Return (N, D) float32 features of (N, 3, H, W) uint8 pictures."""
        return texture_features(images)

    def text_features(self, texts: Sequence[str]) -> None:
        """Return None: there is no text tower."""
