"""The Frechet distance between two sets of features (FID).

    FID = ||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

FID is biased upwards by small sets (both sides of a comparison need equally many
pictures); KID (:mod:`ppcl.eval.set_distances`) is not, and may come out slightly negative.
Everything is float64.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppcl.common.files import atomic_path
from ppcl.errors import ArtifactError, UserError


class FeatureStatistics:
    """Streaming mean and covariance of features, in float64 on the CPU.

    Batches are merged by their centred sums (Chan et al.), so a large mean costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (N, D).

        Raises:
            ValueError: The shape differs from the features so far.
        """
        batch = features.detach().cpu().double()
        if not self.count and len(self._mean):
            raise ValueError("statistics without a count cannot be added to; compute them anew")
        if batch.ndim != 2 or (self.count and batch.shape[1] != len(self._mean)):
            width = len(self._mean) if self.count else "D"
            raise ValueError(f"features must be (N, {width}), got {tuple(batch.shape)}")
        if not len(batch):
            return
        mean = batch.mean(0)
        centred = batch - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self._mean, self._scatter = len(batch), mean, scatter
            return
        total = self.count + len(batch)
        shift = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean = self._mean + shift * (len(batch) / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        return self._mean

    @property
    def sigma(self) -> Tensor:
        """The covariance, also of a file that does not say how many pictures are behind it."""
        return self.covariance if self.count else self._scatter

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by count - 1.

        Raises:
            UserError: There are fewer than two pictures.
        """
        if self.count < 2:
            raise UserError(f"a covariance of features needs at least 2 pictures, got {self.count}; give more prompts")
        return self._scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write ``mu``, ``sigma`` and ``count`` as ``.npz``, atomically."""
        import numpy as np

        mu, sigma = self.mean.numpy(), self.covariance.numpy()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=mu, sigma=sigma, count=np.int64(self.count))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what :meth:`save` wrote, or what pytorch-fid and clean-fid write (``mu`` and ``sigma`` alone).

        Without ``count`` the result has a mean and a :attr:`sigma`, but nothing can be added to it.

        Raises:
            ArtifactError: The file is missing, damaged, or holds something else.
        """
        import numpy as np

        result = cls()
        try:
            with np.load(path, allow_pickle=False) as data:
                result.count = int(data["count"]) if "count" in data else 0
                result._mean = torch.from_numpy(data["mu"]).double()
                result._scatter = torch.from_numpy(data["sigma"]).double() * max(1, result.count - 1)
        except FileNotFoundError:
            raise ArtifactError(f"{path} does not exist; compute and save the statistics first") from None
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"{path} is not a file of feature statistics (mu, sigma): {reason}; delete it and write it again"
            ) from None
        if result._mean.ndim != 1 or result._scatter.shape != (len(result._mean),) * 2:
            raise ArtifactError(f"{path} is damaged: mu and sigma do not fit together; delete it and write it again")
        return result


def _root_factor(sigma: Tensor) -> Tensor:
    """Return A with A A^T = sigma; rounding below zero in the spectrum is cut."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


def _float64(value: Statistic) -> Tensor:
    return torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value.detach().cpu()).double()


Statistic = Tensor | NDArray[Any] | Sequence[Any]


def frechet_distance(mu1: Statistic, sigma1: Statistic, mu2: Statistic, sigma2: Statistic) -> float:
    """Squared Frechet distance of two Gaussians.

    With S1 = A A^T and S2 = B B^T, tr (S1 S2)^(1/2) is the sum of the singular values of A^T B:
    real for any covariances, singular ones too, where the square root of the product is not.

    Args:
        mu1: (D,) mean; a tensor, a numpy array, or what numpy makes one of.
        sigma1: (D, D) covariance.
        mu2: (D,) mean.
        sigma2: (D, D) covariance.

    Returns:
        The distance, not negative.

    Raises:
        UserError: A statistic is not finite, or their shapes do not fit.
    """
    mu, sigma, other_mu, other_sigma = (_float64(value) for value in (mu1, sigma1, mu2, sigma2))
    if mu.ndim != 1 or other_mu.shape != mu.shape or not sigma.shape == other_sigma.shape == (len(mu), len(mu)):
        shapes = ", ".join(str(tuple(value.shape)) for value in (mu, sigma, other_mu, other_sigma))
        raise UserError(f"statistics must be (D,), (D, D), (D,), (D, D), got {shapes}; use one network for both sets")
    if not all(bool(value.isfinite().all()) for value in (mu, sigma, other_mu, other_sigma)):
        raise UserError("features hold NaN or infinity, so no FID can be computed; look at the pictures they come from")
    overlap = torch.linalg.svdvals(_root_factor(sigma).T @ _root_factor(other_sigma)).sum()
    distance = (mu - other_mu).square().sum() + sigma.trace() + other_sigma.trace() - 2 * overlap
    return max(0.0, float(distance))


def fid(features1: Tensor, features2: Tensor) -> float:
    """Frechet distance of two feature sets (N1, D) and (N2, D).

    Raises:
        UserError: A set has fewer than two pictures.
    """
    first, second = FeatureStatistics(), FeatureStatistics()
    first.update(features1)
    second.update(features2)
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
