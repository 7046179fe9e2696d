"""How well pictures fit their captions: CLIP score and caption retrieval."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.detach().cpu().double(), dim=-1)


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            "image and text features must be pairs (N, D) with N > 0, "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """100 times the mean over pictures of max(cosine to the own caption, 0).

    Args:
        image_features: (N, D), of any length.
        text_features: (N, D), row i is the caption of picture i.

    Returns:
        A number from 0 to 100.

    Raises:
        ValueError: The features are not pairs.
    """
    _check_pairs(image_features, text_features)
    cosine = (_unit(image_features) * _unit(text_features)).sum(1)
    return 100 * float(cosine.clamp(min=0).mean())


def retrieval_at(image_features: Tensor, text_features: Tensor, k: int) -> float:
    """Share of pictures whose own caption is among the k most similar of all given captions.

    A caption as similar as the own one counts as better, so features that say nothing (all
    equal) score 0; captions must be distinct for the number to mean anything.

    Args:
        image_features: (N, D), of any length.
        text_features: (N, D), row i is the caption of picture i.
        k: Places that count.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: The features are not pairs, or k is below 1.
    """
    _check_pairs(image_features, text_features)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    similarity = _unit(image_features) @ _unit(text_features).T  # (pictures, captions)
    own = similarity.diagonal()[:, None]
    # "not smaller" rather than "greater or equal": a NaN must not count as a hit
    rank = (~(similarity < own)).sum(1)
    return float((rank <= k).double().mean())
