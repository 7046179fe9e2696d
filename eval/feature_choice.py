"""Which features and which real pictures belong to a model, and what is used where they are out of reach."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ppcl.errors import UserError
from ppcl.eval.features import FeatureExtractor, load_extractor

logger = logging.getLogger(__name__)
DEFAULT_FEATURES = "ViT-B-32/openai"


def choose_extractor(model: str, features: str, device: str) -> FeatureExtractor:
    """Load the feature extractor: the embedded one for the embedded model, ViT-B-32 otherwise."""
    extractor, note = extractor_with_note(model, features, device)
    if note:
        logger.warning("%s", note)
    return extractor


def extractor_with_note(model: str, features: str, device: str) -> tuple[FeatureExtractor, str | None]:
    """Load the feature extractor, and say what was used instead of what, if its weights are out of reach."""
    if features != "auto":
        return load_extractor(features, device), None
    if model == "emoji":
        return load_extractor("emoji", device), None
    try:
        return load_extractor(DEFAULT_FEATURES, device), None
    except UserError as error:
        note = f"{error}; the embedded emoji evaluator is used instead, which knows emoji alone"
        return load_extractor("emoji", device), note


def references_for(model: str) -> Tensor | None:
    """Real pictures behind FID: all of the embedded data set for the embedded model, (N, 3, H, W) uint8."""
    if model != "emoji":
        return None
    from ppcl.emoji.data import load_pairs, load_pictures

    return torch.from_numpy(load_pictures(load_pairs())).permute(0, 3, 1, 2).contiguous()
