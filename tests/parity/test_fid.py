"""FID and KID against scipy's matrix square root and against torchmetrics, on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ppcl.eval.fid import fid
from ppcl.eval.set_distances import kid

SHAPES = [(200, 16), (500, 64)]


def feature_sets(count: int, width: int) -> tuple[Tensor, Tensor]:
    """Two correlated, differently scaled and shifted sets."""
    generator = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    first = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix
    second = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix.T * 1.3 + 0.2
    return first, second


@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_frechet_matches_scipy(count: int, width: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (features.numpy() for features in feature_sets(count, width))
    sigma1, sigma2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shift = first.mean(0) - second.mean(0)
    expected = shift @ shift + np.trace(sigma1 + sigma2 - 2 * linalg.sqrtm(sigma1 @ sigma2).real)
    assert fid(torch.from_numpy(first), torch.from_numpy(second)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_frechet_matches_torchmetrics(count: int, width: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    first, second = feature_sets(count, width)
    moments = [value for features in (first, second) for value in (features.mean(0), features.T.cov())]
    assert fid(first, second) == pytest.approx(float(_compute_fid(*moments)), rel=1e-6)


def test_frechet_of_few_pictures_matches_torchmetrics() -> None:
    """Singular covariances, where a plain matrix square root turns complex."""
    from torchmetrics.image.fid import _compute_fid

    first, second = feature_sets(20, 64)
    moments = [value for features in (first, second) for value in (features.mean(0), features.T.cov())]
    # the eigenvalues behind torchmetrics' square root carry the rounding of a rank-deficient product
    assert fid(first, second) == pytest.approx(float(_compute_fid(*moments)), rel=1e-5)


def test_kid_matches_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    first, second = feature_sets(1100, 16)  # more rows than one slab of the kernel matrix
    assert kid(first, second) == pytest.approx(float(poly_mmd(first, second)), rel=1e-9)
