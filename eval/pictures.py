"""Features of picture files of any number, size and mode, in bounded memory, cached by content.

Pictures are read and resized one chunk at a time, from their own size straight to the
network's, as clean-FID does: resizing a folder to one size first would filter twice. A
picture's features are filed under the SHA-256 of its file and the identity of the network, so
a second look at the same files costs one read of each.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.common.files import digest
from ppcl.common.outside import open_regular
from ppcl.common.pictures import MAX_BYTES, SUFFIXES, picture_files
from ppcl.common.progress import Progress
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.errors import ArtifactError, UserError
from ppcl.eval.features import CHUNK, FeatureExtractor
from ppcl.eval.fid import FeatureStatistics
from ppcl.eval.generate import read_picture
from ppcl.eval.scoring import Reference

logger = logging.getLogger(__name__)

CHUNK_PIXELS = 2**24  # read at once, at most (but one picture at least): 64 of 512 px, 16 of 1024 px
SAVE_EVERY = 32  # chunks between writes of the cache, so that an interrupted run loses little


def reference_files(folder: Path) -> list[Path]:
    """All pictures in a folder and the folders in it, in a fixed order.

    Files of one name in several folders are several pictures.

    Raises:
        UserError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"reference folder {folder} does not exist; give a folder of pictures or a .npz of statistics")
    pictures = [path for path in picture_files(folder) if path.is_file()]
    if not pictures:
        raise UserError(
            f"reference folder {folder} holds no pictures ({', '.join(SUFFIXES)}); give a folder that does, "
            "or leave --reference out"
        )
    return pictures


def identity(extractor: FeatureExtractor) -> str:
    """Identify a network by its name and weights, so that cached features of other weights are not used."""
    network: Any = getattr(extractor, "model", None) or getattr(extractor, "layers", None)
    sums: list[float] = []
    if isinstance(network, nn.Module):
        sums = [float(parameter.detach().double().abs().sum()) for parameter in network.parameters()]
    return digest(extractor.name, sums)


class FeatureCache:
    """Features by content, in one safetensors file.

    Args:
        path: The file; a damaged one, or one of another network, is started anew.
        network: From :func:`identity`.
    """

    def __init__(self, path: Path, network: str) -> None:
        self.path, self.network = path, network
        self.rows: dict[str, Tensor] = {}
        self.is_changed = False
        if path.is_file():
            try:
                tensors, meta = read_tensors(path)
            except ArtifactError:
                logger.warning("%s is damaged and computed again", path)
                return
            names = meta.get("files") if meta and meta.get("network") == network else None
            if isinstance(names, list) and len(names) == len(tensors.get("features", ())):
                self.rows = {str(name): row for name, row in zip(names, tensors.get("features", ()), strict=True)}

    def add(self, keys: Sequence[str], features: Tensor) -> None:
        """Remember the features (N, D) of N files."""
        self.rows.update(zip(keys, features, strict=True))
        self.is_changed = True

    def save(self) -> None:
        """Write what was added."""
        if self.is_changed:
            meta = {"network": self.network, "files": list(self.rows)}
            write_tensors(self.path, {"features": torch.stack(list(self.rows.values()))}, meta)
            self.is_changed = False


def _hash(path: Path) -> str:
    try:
        with open_regular(path, MAX_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"picture {path} cannot be read: {error.strerror or error}; check it") from None


def _describe_chunk(paths: Sequence[Path], extractor: FeatureExtractor) -> Tensor:
    """Features of a chunk of files, pictures of one size together, little of it in memory at a time."""
    rows: list[Tensor | None] = [None] * len(paths)
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    pixels = 0

    def flush() -> None:
        nonlocal pixels
        for group in waiting.values():
            images = torch.from_numpy(np.stack([array for _, array in group])).permute(0, 3, 1, 2).contiguous()
            for (place, _), row in zip(group, extractor.image_features(images), strict=True):
                rows[place] = row
        waiting.clear()
        pixels = 0

    for place, path in enumerate(paths):
        array = read_picture(path)
        if pixels and pixels + array.shape[0] * array.shape[1] > CHUNK_PIXELS:
            flush()
        waiting.setdefault(array.shape, []).append((place, array))
        pixels += array.shape[0] * array.shape[1]
    flush()
    return torch.stack([row for row in rows if row is not None])


def describe(
    paths: Sequence[Path], extractor: FeatureExtractor, cache: Path | None = None, label: str = "features"
) -> Tensor:
    """Features of picture files.

    Chunks have fixed places, and one with any new file is computed whole: the last bits of a batched
    forward pass depend on its neighbours, and an interrupted run must end up the same.

    Args:
        paths: Picture files of any sizes and modes.
        extractor: The network.
        cache: A safetensors file that keeps the features by content; None keeps nothing.
        label: Shown beside the progress bar.

    Returns:
        (N, D) float32.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    if not paths:
        raise UserError("no pictures to describe; give at least one")
    feature_cache = FeatureCache(cache, identity(extractor)) if cache else None
    parts = []
    with Progress(label, total=len(paths)) as progress:
        for number, start in enumerate(range(0, len(paths), CHUNK)):
            chunk = paths[start : start + CHUNK]
            keys = [_hash(path) for path in chunk] if feature_cache else []
            if feature_cache and all(key in feature_cache.rows for key in keys):
                parts.append(torch.stack([feature_cache.rows[key] for key in keys]))
            else:
                parts.append(_describe_chunk(chunk, extractor))
            if feature_cache and any(key not in feature_cache.rows for key in keys):
                feature_cache.add(keys, parts[-1])
                if number % SAVE_EVERY == SAVE_EVERY - 1:
                    feature_cache.save()
            progress.advance(len(chunk))
    if feature_cache:
        feature_cache.save()
    return torch.cat(parts)


def load_statistics(path: Path, width: int) -> Reference:
    """Read mean and covariance of features: ours, or those of pytorch-fid and the like (``mu``, ``sigma``).

    Args:
        path: The ``.npz`` file.
        width: Features that the network in use gives.

    Raises:
        ArtifactError: The file is missing, damaged, or of another network.
    """
    moments = FeatureStatistics.load(path)
    if len(moments.mean) != width:
        raise ArtifactError(
            f"{path} holds statistics of {len(moments.mean)} features, the evaluator gives {width}; "
            "set evaluate.features to the network that they were made with"
        )
    return Reference(moments.mean, moments.sigma, moments.count or None)


def compare_pairs(
    first: Sequence[Path], second: Sequence[Path], measures: Mapping[str, Callable[[Tensor, Tensor], Sequence[float]]]
) -> dict[str, list[float]]:
    """Apply paired measures to picture files, a few at a time.

    Args:
        first: Files of the first model.
        second: Files of the second; file i belongs to file i.
        measures: Each takes two (N, 3, H, W) uint8 and gives N numbers.

    Returns:
        One number a pair for each measure; nothing where the sizes of any pair differ.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    for a, b in _pairs(first, second):
        if a.shape != b.shape:
            return {}
        for name, measure in measures.items():
            values[name] += list(measure(a, b))
    return values


def _pairs(first: Sequence[Path], second: Sequence[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    """One pair at a time, (1, 3, H, W) each: pictures of one model may differ in size."""
    for first_path, second_path in zip(first, second, strict=True):
        a, b = (torch.from_numpy(read_picture(path)).permute(2, 0, 1)[None] for path in (first_path, second_path))
        yield a, b
