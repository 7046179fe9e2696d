"""KID and CMMD, and set distances as means: how much each picture pulls FID, KID and CMMD.

    KID = unbiased MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3

    D(P) = D(P_n) + mean of the items' influences + smaller terms       (von Mises expansion)

The influence of an item is the derivative of the distance when the item's weight grows. An
item's value below is the distance plus its influence, so the mean of the values is the
distance itself and their spread is its standard error: :mod:`ppcl.eval.intervals` draws them
again, paired between models, at the cost of one matrix decomposition instead of thousands.
The set that is compared with is held fixed: the interval is about the pictures drawn.
It says nothing about the bias of FID, which shrinks as pictures are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl.errors import UserError

BLOCK_ELEMENTS = 2**23  # of a slab of a kernel or distance matrix: 64 MB in float64
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4
Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Distance:
    """A distance between two sets, and what each picture of the first contributes.

    Attributes:
        value: The distance.
        items: (N,) float64 whose mean is the distance.
    """

    value: float
    items: Tensor


def slabs(rows: Tensor, columns: int) -> Iterator[Tensor]:
    """Split rows so that a slab of them against so many columns stays small."""
    yield from torch.split(rows, max(1, BLOCK_ELEMENTS // max(1, columns)))


def frechet_items(features: Tensor, mu: Tensor, sigma: Tensor, value: float) -> Tensor:
    """Values of pictures whose mean is the Frechet distance to N(mu, sigma).

    With T the map that carries the pictures' Gaussian to the other one (T S T = sigma), the derivative
    of the distance is 2 (m - mu).(x - m) + (x - m)^T (I - T) (x - m), less its mean. T lives on the span
    of the pictures, so fewer pictures than features are no exception.

    Args:
        features: (N, D) of the pictures, N > 1.
        mu: (D,) mean of the set that they are compared with.
        sigma: (D, D) its covariance.
        value: The distance.

    Returns:
        (N,) float64.
    """
    x = features.detach().cpu().double()
    mu, sigma = mu.double(), sigma.double()
    mean = x.mean(0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    kept = variances > variances[-1].clamp(min=0) * 1e-10
    linear = 2 * centred @ (mean - mu)
    if not bool(kept.any()):  # all pictures have the same features
        return torch.full((len(x),), value, dtype=torch.float64)
    axes, roots = axes[:, kept], variances[kept].sqrt()
    inner = roots[:, None] * (axes.T @ sigma @ axes) * roots
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    whitened = (centred @ axes) / roots @ vectors
    quadratic = centred.square().sum(1) - (whitened.square() * values.clamp(min=0).sqrt()).sum(1)
    items: Tensor = value + linear + quadratic - quadratic.mean()
    return items


def polynomial_kernel(width: int) -> Kernel:
    """KID's kernel (x.y / D + 1)^3 for features of so many dimensions."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ b.T) / width + 1).pow(3)

    return kernel


def gaussian_kernel(sigma: float) -> Kernel:
    """CMMD's kernel exp(-||x - y||^2 / (2 sigma^2))."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * sigma**2)).exp()

    return kernel


def _row_means(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    return torch.cat([kernel(part, y).mean(1) for part in slabs(x, len(y))])


def kid(features1: Tensor, features2: Tensor) -> float:
    """Kernel distance: unbiased squared MMD over all pairs, with the kernel (x.y / D + 1)^3.

    Args:
        features1: (N1, D).
        features2: (N2, D).

    Returns:
        The estimate; around 0, of either sign, for equal distributions.

    Raises:
        UserError: A set has fewer than two pictures.
    """
    x, y = features1.detach().cpu().double(), features2.detach().cpu().double()
    if min(len(x), len(y)) < 2:
        raise UserError(f"KID needs at least 2 pictures on both sides, got {len(x)} and {len(y)}; give more prompts")
    factor = 1.0 / x.shape[1]

    def kernel_sum(a: Tensor, b: Tensor) -> Tensor:
        # in rows, so that 50,000 pictures need no 50,000 x 50,000 matrix
        rows = [((part @ b.T) * factor + 1.0).pow(3).sum() for part in torch.split(a, 1024)]
        return torch.stack(rows).sum()

    def within(a: Tensor) -> Tensor:
        itself = (a.square().sum(1) * factor + 1.0).pow(3).sum()
        return (kernel_sum(a, a) - itself) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y)))


def kid_items(features: Tensor, reference: Tensor, value: float) -> Tensor:
    """Values of pictures whose mean is KID.

    Args:
        features: (N, D) of the pictures.
        reference: (M, D) of the set that they are compared with.
        value: KID of the two.

    Returns:
        (N,) float64.
    """
    x, y = features.detach().cpu().double(), reference.detach().cpu().double()
    kernel = polynomial_kernel(x.shape[1])
    itself = (x.square().sum(1) / x.shape[1] + 1).pow(3)
    own = (_row_means(x, x, kernel) * len(x) - itself) / (len(x) - 1)
    pull = 2 * (own - _row_means(x, y, kernel))
    return value + pull - pull.mean()


def kid_subsets(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """KID over random subsets, as torchmetrics and the KID paper report it.

    Args:
        features: (N, D).
        reference: (M, D).
        subsets: How many.
        subset_size: Pictures of each side in a subset; at most half of the smaller side, since subsets that
            are nearly the whole set differ in nothing.
        seed: Of the choice.

    Returns:
        Mean and standard deviation (of the subsets, not of their mean); None with fewer than 8 pictures on a side.
    """
    size = min(subset_size, len(features) // 2, len(reference) // 2)
    if size < 4:
        return None
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        ours = features[torch.randperm(len(features), generator=generator)[:size]]
        theirs = reference[torch.randperm(len(reference), generator=generator)[:size]]
        values.append(kid(ours, theirs))
    distances = torch.tensor(values, dtype=torch.float64)
    return float(distances.mean()), float(distances.std(correction=0))


def cmmd(features: Tensor, reference: Tensor) -> Distance:
    """CMMD: 1000 times the squared MMD of unit CLIP features with a Gaussian kernel of sigma 10.

    The authors' estimator (Jayasumana et al. 2024) keeps the diagonal of the kernel matrices, so it is
    not negative and slightly biased.

    Args:
        features: (N, D) CLIP features of the pictures, of any length.
        reference: (M, D) of the set that they are compared with.

    Raises:
        UserError: A set is empty.
    """
    if not len(features) or not len(reference):
        raise UserError(f"CMMD needs pictures on both sides, got {len(features)} and {len(reference)}; give more")
    x, y = (F.normalize(part.detach().cpu().double(), dim=-1) for part in (features, reference))
    kernel = gaussian_kernel(CMMD_SIGMA)
    within, cross = _row_means(x, x, kernel), _row_means(x, y, kernel)
    value = CMMD_SCALE * float(within.mean() + _row_means(y, y, kernel).mean() - 2 * cross.mean())
    pull = 2 * CMMD_SCALE * (within - cross)
    return Distance(value, value + pull - pull.mean())
