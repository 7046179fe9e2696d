"""All numbers about sets of pictures, each with its interval.

``measure`` gives the numbers of one set; ``paired`` those of two sets drawn for the same
prompts from the same noise; ``drop`` says what the second lost of the first. A
:class:`Measured` keeps the values behind a number, so that two of them can be compared
prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppcl.common.streams import Stream, step_generator
from ppcl.eval.clip import caption_ranks, clip_items
from ppcl.eval.fid import FeatureStatistics, frechet_distance
from ppcl.eval.intervals import Array, Interval, drop_interval, interval, share_interval
from ppcl.eval.metrics import CAPTION_SCORES, SHARES, Over
from ppcl.eval.neighbours import NEIGHBOURS, manifold
from ppcl.eval.set_distances import cmmd, frechet_items, kid, kid_items, kid_subsets


@dataclass(frozen=True)
class Reference:
    """What the distances compare with.

    Attributes:
        mu: (D,) float64 mean of its features.
        sigma: (D, D) float64 covariance.
        count: Pictures behind it; None where the file of statistics does not say.
        features: (M, D) features, or None where only mean and covariance are known.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None
    features: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """One number.

    Attributes:
        value: The number.
        items: (N,) values whose mean it is; None for a number that has no interval.
        over: What the items are.
        is_share: Whether the items are 0 or 1, or means of such over seeds.
    """

    value: float
    items: Array | None = None
    over: Over = "pictures"
    is_share: bool = False

    @property
    def interval(self) -> Interval | None:
        """Its bootstrap interval."""
        if self.items is None:
            return None
        return share_interval(self.items) if self.is_share else interval([self.items])


def reference_of(features: Tensor) -> Reference:
    """Describe a set of pictures that others are compared with.

    Args:
        features: (M, D), M > 1.

    Raises:
        UserError: There are fewer than two pictures.
    """
    moments = FeatureStatistics()
    moments.update(features)
    return Reference(moments.mean, moments.covariance, len(features), features)


def _array(values: Tensor | Sequence[float]) -> Array:
    return np.asarray(values.numpy() if isinstance(values, Tensor) else values, dtype=np.float64)


def _mean_of(name: str, values: Tensor, over: Over = "pictures") -> Measured:
    items = _array(values.double())
    return Measured(float(items.mean()), items, over, name in SHARES)


def caption_measures(features: Tensor, text: Tensor) -> dict[str, Measured]:
    """CLIP score and caption retrieval.

    Args:
        features: (N, D) of the pictures.
        text: (N, D) of their captions.
    """
    ranks = caption_ranks(features, text)
    return {
        "clip_score": _mean_of("clip_score", clip_items(features, text)),
        **{f"retrieval_at_{k}": _mean_of(f"retrieval_at_{k}", ranks <= k) for k in (1, 5)},
    }


def set_measures(features: Tensor, reference: Reference, is_clip: bool) -> dict[str, Measured]:
    """FID and, where the reference's own features are known, KID, precision, recall, density, coverage, CMMD.

    Args:
        features: (N, D) of the pictures, N > 1.
        reference: What they are compared with.
        is_clip: Whether the features are CLIP's, as CMMD wants them.

    Raises:
        UserError: There are too few pictures, or features are not finite.
    """
    measures, real = _distances(features, reference, is_clip), reference.features
    if real is None:
        return measures
    if subsets := kid_subsets(features, real):
        measures["kid_std"] = Measured(subsets[1])
    if min(len(features), len(real)) > NEIGHBOURS:
        near = manifold(features, real)
        measures |= {name: _mean_of(name, getattr(near, name)) for name in ("precision", "density")}
        measures |= {name: _mean_of(name, getattr(near, name), "references") for name in ("recall", "coverage")}
    return measures


def _distances(features: Tensor, reference: Reference, is_clip: bool) -> dict[str, Measured]:
    """FID and, where the reference's own features are known, KID and CMMD; for the arguments see ``set_measures``."""
    moments = FeatureStatistics()
    moments.update(features)
    value = frechet_distance(moments.mean, moments.covariance, reference.mu, reference.sigma)
    found = {"fid": Measured(value, _array(frechet_items(features, reference.mu, reference.sigma, value)))}
    real = reference.features
    if real is not None:
        distance = kid(features, real)
        found["kid"] = Measured(distance, _array(kid_items(features, real, distance)))
        if is_clip:
            mmd = cmmd(features, real)
            found["cmmd"] = Measured(mmd.value, _array(mmd.items))
    return found


FLOOR_DRAWS = 5


def floor_of(reference: Reference, count: int, is_clip: bool) -> dict[str, float]:
    """The distances of so many of the reference's own pictures to its others: no model can be expected below.

    Args:
        reference: What others are compared with.
        count: Pictures that a model draws, since FID depends on it.
        is_clip: Whether the features are CLIP's.

    Returns:
        Means over several draws; empty where the reference's features are not known, or too few.
    """
    features = reference.features
    if features is None or count < 2 or len(features) < 2 * count:
        return {}
    found: dict[str, list[float]] = {}
    for draw in range(FLOOR_DRAWS):
        order = torch.randperm(len(features), generator=step_generator(draw, 0, Stream.REFERENCE_HALVES))
        rest = reference_of(features[order[count:]])
        for name, entry in _distances(features[order[:count]], rest, is_clip).items():
            found.setdefault(name, []).append(entry.value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def measure(features: Tensor, reference: Reference | None, text: Tensor | None) -> dict[str, Measured]:
    """All numbers of one set of pictures; what cannot be computed is not in the result."""
    measures = set_measures(features, reference, text is not None) if reference is not None else {}
    return measures | (caption_measures(features, text) if text is not None else {})


def paired(values: Mapping[str, Sequence[float]]) -> dict[str, Measured]:
    """Numbers of pairs: PSNR, SSIM and the like, one value a pair."""
    return {name: _mean_of(name, torch.tensor(items, dtype=torch.float64)) for name, items in values.items()}


def drop(first: Mapping[str, Measured], second: Mapping[str, Measured]) -> Interval | None:
    """What the second lost of the first: mean relative loss of the scores in percent, paired by prompt."""
    names = [name for name in CAPTION_SCORES if name in first and name in second]
    pairs = [(first[name].items, second[name].items) for name in names]
    items = [(a, b) for a, b in pairs if a is not None and b is not None]
    return drop_interval([a for a, _ in items], [b for _, b in items]) if items else None


def differences(first: Mapping[str, Measured], second: Mapping[str, Measured]) -> dict[str, Interval]:
    """Second minus first of every number over pictures, paired by prompt."""
    intervals = {}
    for name, entry in first.items():
        other = second.get(name)
        if (
            entry.items is not None
            and other is not None
            and other.items is not None
            and len(entry.items) == len(other.items)
        ):
            intervals[name] = interval([other.items - entry.items])
    return intervals


def drop_by_prompt(first: Mapping[str, Measured], second: Mapping[str, Measured]) -> Measured | None:
    """The average drop as a mean over prompts: what each adds to it, to first order.

    Two drops against one model can so be compared prompt by prompt.

    Args:
        first: What is compared with.
        second: What lost; its items are about the same prompts.
    """
    shares = []
    for name in CAPTION_SCORES:
        if name in first and name in second and first[name].value != 0:
            a, b = (np.asarray(side[name].items) for side in (first, second))
            kept = b.mean() / a.mean()
            shares.append(1 - kept - (b - b.mean()) / a.mean() + kept * (a - a.mean()) / a.mean())
    if not shares:
        return None
    items = 100 * np.mean(shares, axis=0)
    return Measured(float(items.mean()), items)


def mean_over_seeds(seeds: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """The mean of each number over several seeds, prompt by prompt; over those that have it.

    Args:
        seeds: For each seed the numbers, whose items are about the same prompts.
    """
    means = {}
    for name in dict.fromkeys(name for each in seeds for name in each):
        entries = [each[name] for each in seeds if name in each]
        columns = [entry.items for entry in entries if entry.items is not None]
        items = np.mean(columns, axis=0) if columns else None
        value = float(np.mean([entry.value for entry in entries]))
        means[name] = Measured(value, items, entries[0].over, entries[0].is_share)
    return means


def limits(measures: Mapping[str, Measured]) -> dict[str, list[float] | None]:
    """The intervals as ``metrics.json`` holds them: ``[low, high]`` by name, None where there is none."""
    by_name: dict[str, list[float] | None] = {}
    for name, entry in measures.items():
        bounds = entry.interval
        by_name[name] = [bounds.low, bounds.high] if bounds else None
    return by_name
