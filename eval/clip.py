"""How well pictures fit their captions: CLIP score and caption retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**23  # similarities in memory at a time


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.detach().cpu().double(), dim=-1)


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            "image and text features must be pairs (N, D) with N > 0, "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def clip_items(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 times max(cosine to the own caption, 0) of each picture; their mean is the CLIP score.

    Args:
        image_features: (N, D), of any length.
        text_features: (N, D), row i is the caption of picture i.

    Returns:
        (N,) float64, 0 to 100.

    Raises:
        ValueError: The features are not pairs.
    """
    _check_pairs(image_features, text_features)
    cosine = (_unit(image_features) * _unit(text_features)).sum(1)
    return 100 * cosine.clamp(min=0)


def caption_ranks(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Place of each picture's own caption among all given captions by similarity, (N,), 1 for the first.

    A caption as similar as the own one counts as better.

    Raises:
        ValueError: The features are not pairs.
    """
    _check_pairs(image_features, text_features)
    images, texts = _unit(image_features), _unit(text_features)
    rows = max(1, BLOCK_ELEMENTS // len(texts))  # 50,000 pictures need no 50,000 x 50,000 matrix
    ranks = []
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        similarity = images[part] @ texts.T  # (pictures, captions)
        places = torch.arange(len(similarity))
        mine = similarity[places, places + start]
        # "not smaller" rather than "greater or equal": a NaN must not count as a hit
        ranks.append((~(similarity < mine[:, None])).sum(1))
    return torch.cat(ranks)
