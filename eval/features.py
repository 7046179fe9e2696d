"""Picture and text features: open_clip models and Inception.

Pictures are resized as clean-FID does: bicubic with antialiasing like PIL's, in floating
point to the end (no rounding to 8 bits in between), clipped to the range of a picture.
Features are returned as the tower gives them; :mod:`ppcl.eval.clip` normalises them for
angles, :mod:`ppcl.eval.fid` uses them raw.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcl.common.optional import optional_module
from ppcl.errors import ModelError, nearest

ResizeMode = Literal["squash", "shortest", "longest"]
LOCAL_PREFIX = "local-dir:"
CHUNK = 64  # pictures a forward pass; fixed, so that features do not depend on any setting
INCEPTION_SIZE = 299
INCEPTION_LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


class FeatureExtractor(Protocol):
    """What turns pictures, and perhaps texts, into vectors."""

    name: str

    def image_features(self, images: Tensor) -> Tensor:
        """Return (N, D) float32 features on the CPU of (N, 3, H, W) uint8 pictures."""

    def text_features(self, texts: Sequence[str]) -> Tensor | None:
        """Return (N, D) float32 features on the CPU, or None where there is no text tower."""


def resize(images: Tensor, size: int, mode: ResizeMode = "squash", fill: float = 0.0) -> Tensor:
    """Resize pictures to a square as clean-FID does.

    Args:
        images: (N, 3, H, W), values 0-255.
        size: Side of the result in pixels.
        mode: ``squash`` ignores the aspect ratio, ``shortest`` scales the shorter side and crops the
            centre, ``longest`` scales the longer side and pads with ``fill``.
        fill: Value of the padding, 0-255.

    Returns:
        (N, 3, size, size) float32 in [0, 255], not rounded.
    """
    height, width = images.shape[-2:]
    scale = {"squash": 0.0, "shortest": size / min(height, width), "longest": size / max(height, width)}[mode]
    target = (round(height * scale), round(width * scale)) if scale else (size, size)
    pictures = images.float()
    if target != (height, width):
        pictures = F.interpolate(pictures, size=target, mode="bicubic", antialias=True, align_corners=False)
    vertical, horizontal = size - target[0], size - target[1]  # negative padding crops
    edges = (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
    if any(edges):
        pictures = F.pad(pictures, edges, value=fill)
    return pictures.clamp(0, 255)


def _in_chunks(call: Callable[[Any], Tensor], items: Any) -> Tensor:
    with torch.no_grad():
        parts = [call(items[start : start + CHUNK]).float().cpu() for start in range(0, len(items), CHUNK)]
    return torch.cat(parts)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"pictures must be (N, 3, H, W) uint8 with N > 0, got {tuple(images.shape)} {images.dtype}")


class ClipExtractor:
    """Both towers of an open_clip model.

    Args:
        name: What the numbers are filed under.
        model: An open_clip model whose ``visual.preprocess_cfg`` says how pictures are prepared.
        tokenizer: Turns a list of texts into (N, L) token ids.
        device: Where it runs.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], device: str) -> None:
        self.name, self.device = name, device
        model.to(device).eval().requires_grad_(False)
        self.model: Any = cast(Any, model)
        self.tokenizer = tokenizer
        config: dict[str, Any] = self.model.visual.preprocess_cfg
        size = config["size"]
        self.size = int(size if isinstance(size, int) else size[0])
        self.mode: ResizeMode = config.get("resize_mode", "shortest")
        self.fill = float(config.get("fill_color", 0))
        self.mean = torch.tensor(config["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(config["std"], device=device).view(3, 1, 1)

    def _encode(self, images: Tensor) -> Tensor:
        pictures = resize(images.to(self.device), self.size, self.mode, self.fill) / 255
        features: Tensor = self.model.encode_image((pictures - self.mean) / self.std)
        return features

    def image_features(self, images: Tensor) -> Tensor:
        """Return (N, D) float32 features, not normalised, of (N, 3, H, W) uint8 pictures."""
        _check_images(images)
        return _in_chunks(self._encode, images)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return (N, D) float32 features, not normalised, of N texts."""
        return _in_chunks(lambda part: self.model.encode_text(self.tokenizer(part).to(self.device)), list(texts))


def cut_texts(extractor: FeatureExtractor, texts: Sequence[str]) -> tuple[list[str], int]:
    """The texts whose ends an extractor does not read, and how many tokens it reads; none where it reads no text."""
    tokenizer = getattr(extractor, "tokenizer", None)
    if tokenizer is None or not texts:
        return [], 0
    empty, whole, shorter = (tokenizer(part) for part in ([""], list(texts), [text[:-1] for text in texts]))
    # of a text that is read to its end the last character counts, or there is padding behind it
    is_cut = (whole == shorter).all(1) & (whole[:, -1] != empty[0, -1])
    return [text for text, cut in zip(texts, is_cut.tolist(), strict=True) if cut], whole.shape[1]


class InceptionExtractor:
    """The 2048 pooled features of the Inception network behind the usual FID.

    Args:
        network: torch-fidelity's ``FeatureExtractorInceptionV3`` with its weights.
        device: Where it runs.
    """

    name = "inception"

    def __init__(self, network: nn.Module, device: str) -> None:
        # the network's own forward resizes without antialiasing; its layers up to the pooling are a chain
        self.layers = nn.Sequential(*(getattr(network, layer) for layer in INCEPTION_LAYERS)).to(device).eval()
        self.device = device

    def _encode(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.layers((resize(images.to(self.device), INCEPTION_SIZE) - 128) / 128)
        return pooled.flatten(1)

    def image_features(self, images: Tensor) -> Tensor:
        """Return (N, 2048) float32 features of (N, 3, H, W) uint8 pictures."""
        _check_images(images)
        return _in_chunks(self._encode, images)

    def text_features(self, texts: Sequence[str]) -> None:
        """Return None: there is no text tower."""


def _load_inception(device: str) -> InceptionExtractor:
    otherwise = "use evaluate.features=emoji or an open_clip name"
    place = "torch_fidelity.feature_extractor_inceptionv3"
    inception = optional_module(place, "evaluate.features=inception", "inception", otherwise)
    try:
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except (OSError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"the Inception weights can be neither downloaded nor read ({_one_line(error)}); connect once, put "
            f"{inception.URL_INCEPTION_V3.rpartition('/')[2]} into {torch.hub.get_dir()}/checkpoints, or use "
            "evaluate.features=emoji or local-dir:FOLDER"
        ) from error
    return InceptionExtractor(network, device)


def _load_local(name: str, folder: Path, device: str) -> ClipExtractor:
    import open_clip

    weights = [*folder.glob("*.safetensors"), *folder.glob("open_clip_*.bin"), *folder.glob("*.pt")]
    missing = "open_clip_config.json" if not (folder / "open_clip_config.json").is_file() else None
    if missing or not weights:
        raise ModelError(
            f"no evaluator in {folder}: {missing or 'a weights file (open_clip_model.safetensors)'} is missing; "
            "give evaluate.features=local-dir:FOLDER with an open_clip model, or an open_clip name such as "
            "ViT-B-32/openai, or inception"
        )
    try:
        model = open_clip.create_model_from_pretrained(f"{LOCAL_PREFIX}{folder}", return_transform=False)
        tokenizer = open_clip.get_tokenizer(f"{LOCAL_PREFIX}{folder}")
    except Exception as error:  # open_clip passes on whatever safetensors, json, torch or transformers raise
        raise ModelError(
            f"the evaluator in {folder} cannot be loaded ({_one_line(error)}); install or copy the folder again"
        ) from error
    return ClipExtractor(name, model, tokenizer, device)


def _load_named(name: str, device: str) -> ClipExtractor:
    import open_clip

    architecture, _, tag = name.rpartition("/")
    architectures = open_clip.list_models()
    if architecture not in architectures:
        valid = ["emoji", "inception", f"{LOCAL_PREFIX}FOLDER", "ViT-B-32/openai"]
        guess = nearest(architecture or name, architectures) or nearest(name, valid)
        raise ModelError(f"features '{name}' are unknown{guess}; valid: {', '.join(valid)} and others of open_clip")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise ModelError(f"open_clip has no weights '{tag}' for {architecture}{nearest(tag, tags)}; valid: {tags}")
    # OpenAI's weights were trained with another GELU than the plain architecture name stands for
    quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    try:
        with _said_by_us():
            model = open_clip.create_model_from_pretrained(
                architecture, pretrained=tag, force_quick_gelu=quick_gelu, return_transform=False
            )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # a failed download surfaces as one of many hub, HTTP and OS errors
        raise ModelError(
            f"the weights of features '{name}' can be neither found nor downloaded ({_one_line(error)}); "
            "connect once, or use evaluate.features=emoji or local-dir:FOLDER"
        ) from error
    return ClipExtractor(name, model, tokenizer, device)


@contextlib.contextmanager
def _said_by_us() -> Iterator[None]:
    """Keep open_clip from logging a failed download as an error: what is raised says it."""

    def of_others(record: logging.LogRecord) -> bool:
        return f"{os.sep}open_clip{os.sep}" not in record.pathname

    root = logging.getLogger()  # open_clip has no logger of its own
    root.addFilter(of_others)
    try:
        yield
    finally:
        root.removeFilter(of_others)


def _one_line(error: BaseException, length: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


def load_extractor(name: str, device: str = "cpu") -> FeatureExtractor:
    """Load a feature extractor.

    Args:
        name: ``emoji`` (the embedded evaluator), ``inception``, ``local-dir:FOLDER`` (an open_clip model), or
            an open_clip architecture and weights tag as ``ViT-B-32/openai``.
        device: Where it runs.

    Raises:
        ModelError: The name is unknown, or its weights are missing, damaged or out of reach.
    """
    if name == "emoji":
        return _load_local(name, Path(str(files("ppcl"))) / "assets" / "evaluator", device)
    if name == "inception":
        return _load_inception(device)
    if name.startswith(LOCAL_PREFIX):
        # the path is the user's machine, not a property of the numbers: file them under the folder's name
        folder = Path(name.removeprefix(LOCAL_PREFIX)).expanduser()
        return _load_local(f"{LOCAL_PREFIX}{folder.resolve().name}", folder, device)
    return _load_named(name, device)
