"""How close the student's pictures are to the teacher's, pair by pair (same prompt, same noise).

Paired measures see a regression with tens of prompts, where distributions need thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.eval.metrics import PSNR_CAP_DB

CHUNK = 32
LPIPS_MIN_SIDE = 32  # AlexNet's last pooling has nothing left of smaller ones
SSIM_MIN_SIDE = 11
PairMeasure = Callable[[Tensor, Tensor], tuple[float, ...]]  # of two (N, 3, H, W) uint8
SSIM_SIGMA = 1.5  # torchmetrics makes the window 11 pixels wide for it


@dataclass(frozen=True)
class Paired:
    """A measure of N pairs.

    Attributes:
        mean: Mean over the pairs.
        values: One number a pair.
    """

    mean: float
    values: tuple[float, ...]


def _paired(values: Tensor) -> Paired:
    numbers = values.detach().cpu().double()
    return Paired(float(numbers.mean()), tuple(numbers.tolist()))


def _compare(measure: Callable[[Tensor, Tensor], Tensor], images1: Tensor, images2: Tensor) -> Paired:
    """Apply a measure of float64 pictures in [0, 1] in chunks; it returns one number a pair."""
    if images1.shape != images2.shape or images1.ndim != 4 or not len(images1):
        raise ValueError(
            f"pictures must be pairs (N, 3, H, W) with N > 0, got {tuple(images1.shape)} and {tuple(images2.shape)}"
        )
    if images1.dtype != torch.uint8 or images2.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8, got {images1.dtype} and {images2.dtype}")
    pairs = zip(torch.split(images1, CHUNK), torch.split(images2, CHUNK), strict=True)
    return _paired(torch.cat([measure(a.double() / 255, b.double() / 255) for a, b in pairs]))


def psnr(images1: Tensor, images2: Tensor) -> Paired:
    """Peak signal-to-noise ratio in dB.

    Args:
        images1: (N, 3, H, W) uint8.
        images2: The same shape; row i belongs to row i.

    Returns:
        dB, at most 100: equal pictures would be infinite, which neither a mean nor JSON can hold.

    Raises:
        ValueError: The pictures are not pairs of uint8.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def measure(a: Tensor, b: Tensor) -> Tensor:
        value: Tensor = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
        return value.clamp(max=PSNR_CAP_DB)

    return _compare(measure, images1, images2)


def ssim(images1: Tensor, images2: Tensor) -> Paired:
    """Structural similarity (window of 11 pixels, sigma 1.5), 1 for equal pictures.

    Args:
        images1: (N, 3, H, W) uint8.
        images2: The same shape; row i belongs to row i.

    Raises:
        ValueError: The pictures are not pairs of uint8, or smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images1.shape[-2:]) < SSIM_MIN_SIDE:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {tuple(images1.shape[-2:])}")

    def measure(a: Tensor, b: Tensor) -> Tensor:
        value = structural_similarity_index_measure(a, b, sigma=SSIM_SIGMA, reduction="none", data_range=1.0)
        assert isinstance(value, Tensor)
        return value.reshape(-1)

    return _compare(measure, images1, images2)


def lpips_weights() -> tuple[Path, bool]:
    """Where torchvision keeps the AlexNet behind LPIPS, and whether it is there."""
    from torchvision.models import AlexNet_Weights

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
    return path, path.is_file()


@lru_cache(maxsize=1)
def _lpips_network() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).net.eval()


def lpips(images1: Tensor, images2: Tensor) -> Paired:
    """Learned perceptual distance (LPIPS with AlexNet), 0 for equal pictures.

    Nothing is downloaded: see :func:`lpips_weights`.

    Args:
        images1: (N, 3, H, W) uint8.
        images2: The same shape; row i belongs to row i.

    Raises:
        ValueError: The pictures are not pairs of uint8, or too small for the network.
    """
    if min(images1.shape[-2:]) < LPIPS_MIN_SIDE:
        raise ValueError(f"LPIPS needs pictures of at least {LPIPS_MIN_SIDE} pixels, got {tuple(images1.shape[-2:])}")

    def measure(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            value: Tensor = _lpips_network()(a.float(), b.float(), normalize=True)
        return value.reshape(-1)

    return _compare(measure, images1, images2)


def pair_measures(side: int) -> tuple[dict[str, PairMeasure], list[str]]:
    """What can be measured of pairs of pictures here, and notes on what cannot.

    Args:
        side: Shorter side of the pictures in pixels.

    Returns:
        Measures by name, each of two (N, 3, H, W) uint8, N numbers; and one line for each that is left out.
    """
    measures: dict[str, PairMeasure] = {"psnr": lambda a, b: psnr(a, b).values}
    notes = []
    if side >= SSIM_MIN_SIDE:
        measures["ssim"] = lambda a, b: ssim(a, b).values
    else:
        notes.append(f"SSIM is left out: it needs pictures of at least {SSIM_MIN_SIDE} pixels, these have {side}")
    weights, are_there = lpips_weights()
    if not are_there:
        notes.append(f"LPIPS is left out: its AlexNet ({weights.name}) is not in torch's hub folder; put it there")
    elif side < LPIPS_MIN_SIDE:
        notes.append(f"LPIPS is left out: it needs pictures of at least {LPIPS_MIN_SIDE} pixels, these have {side}")
    else:
        measures["lpips"] = lambda a, b: lpips(a, b).values
    return measures, notes
