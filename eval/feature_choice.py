"""Which features and which real pictures belong to a model, and what is used where they are out of reach."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl.errors import UserError
from ppcl.eval.features import FeatureExtractor, load_extractor
from ppcl.eval.scoring import Reference, reference_of

REFERENCE_SEED = 2**20  # of the embedded data's variations: none that anything was trained or checked with
DEFAULT_FEATURES = "ViT-B-32/openai"


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


def real_reference(model: str, extractor: FeatureExtractor) -> tuple[Reference, str] | None:
    """The real pictures behind FID and their name: for the embedded model a variation of each of its data set."""
    if model != "emoji":
        return None
    from ppcl.emoji.data import load_pairs
    from ppcl.emoji.variation import load_varied_pictures

    pictures = torch.from_numpy(load_varied_pictures(load_pairs(), REFERENCE_SEED)).permute(0, 3, 1, 2).contiguous()
    return reference_of(extractor.image_features(pictures)), "real pictures"


def drawn_before(model: str) -> Path | None:
    """The store of pictures that comes with a model: of the embedded one, what its default evaluation draws."""
    if model != "emoji":
        return None
    from ppcl.emoji.data import DRAWN

    return DRAWN
