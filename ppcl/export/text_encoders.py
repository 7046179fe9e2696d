"""Text encoders without their last layers, where nothing reads those: exact, and of FLUX.2 a quarter of one.

Some pipelines take hidden states from the middle of a language model (FLUX.2: layers 10, 20 and 30 of 40), so that the
layers behind the last of these are loaded and run for nothing. How many can go is tried, not known by family: as many
as leave every embedding of two prompts the same, bit for bit.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.files import atomic_path
from ppcl.errors import ModelError
from ppcl.teacher.loading import LOADING_ERRORS, open_pipeline, read_index

logger = logging.getLogger(__name__)
PROMPTS = ("a red fox", "an old harbour at dawn, seen from the hill above it, with three boats and a lighthouse")
READERS = ("tokenizer", "processor", "scheduler", "feature_extractor", "text_processor")  # small, and may be asked
GIVEN = {"device": torch.device("cpu"), "do_classifier_free_guidance": False, "num_images_per_prompt": 1}


class Layers:
    """The layers of a text encoder, of which the last ones can be left out.

    Args:
        owner: The module that runs them; its ``config`` counts them.
        name: Of the list that holds them.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.all = list(getattr(owner, name))
        self.types = list(getattr(owner.config, "layer_types", None) or ())

    def keep(self, count: int) -> None:
        """Leave the first ``count`` of them."""
        config = self.owner.config
        config.num_hidden_layers = count
        if self.types:
            config.layer_types = self.types[:count]
        setattr(self.owner, self.name, nn.ModuleList(self.all[:count]))


def trim_text_encoders(folder: Path) -> dict[str, tuple[int, int]]:
    """Leave out what no embedding depends on, of all text encoders in a pipeline folder.

    Args:
        folder: Of a pipeline; its text encoders are written anew where they become shorter.

    Returns:
        Layers before and after by the component's name, of those that became shorter.

    Raises:
        ModelError: The pipeline's text encoders cannot be called by themselves, or a written one is not the same.
    """
    encoders = {
        name: _load(folder, name, entry[1])
        for name, entry in read_index(folder).items()
        if name.startswith("text_encoder") and isinstance(entry, list) and entry[0] == "transformers"
    }
    if not encoders:
        raise ModelError(f"{folder.name} has no text encoder of transformers; leave --trim-text-encoders out")
    absent = {name: None for name in read_index(folder) if not name.startswith(("_", "text_encoder", *READERS))}
    pipeline = open_pipeline(str(folder), torch.device("cpu"), None, loaded={**absent, **encoders})
    whole = embeddings(pipeline)
    shorter = {}
    for name, encoder in encoders.items():
        for layers in _stacks(pipeline, encoder):
            count = _fewest(pipeline, layers, whole)
            layers.keep(count)
            if count < len(layers.all):
                shorter[name] = (len(layers.all), count)
    for name in shorter:
        with atomic_path(folder / name) as temporary:
            encoders[name].save_pretrained(temporary)
        setattr(pipeline, name, _load(folder, name, type(encoders[name]).__name__))
    if not _same(embeddings(pipeline), whole):
        raise ModelError(f"a shorter text encoder ({', '.join(shorter)}) does not load as it was; please report this")
    return shorter


def _load(folder: Path, name: str, kind: str) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        encoder = getattr(transformers, kind).from_pretrained(folder / name, dtype="auto", use_safetensors=True)
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"{name} cannot be loaded: {reason}; check its files") from error
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embeddings(pipeline: Any) -> list[Tensor]:
    """All tensors that a pipeline makes of two prompts.

    Raises:
        ModelError: It has no ``encode_prompt``, or one that wants more than prompts.
    """
    name = type(pipeline).__name__
    if not hasattr(pipeline, "encode_prompt"):
        raise ModelError(f"{name} has no encode_prompt; leave --trim-text-encoders out")
    wanted = inspect.signature(pipeline.encode_prompt).parameters
    arguments: dict[str, Any] = {key: value for key, value in GIVEN.items() if key in wanted}
    for key, parameter in wanted.items():
        if key == "prompt" or (parameter.default is parameter.empty and key.startswith("prompt")):
            arguments[key] = list(PROMPTS)
    try:
        return list(_tensors(pipeline.encode_prompt(**arguments)))
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            f"{name}.encode_prompt fails on prompts alone ({reason}); leave --trim-text-encoders out"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _stacks(pipeline: Any, encoder: nn.Module) -> list[Layers]:
    """The layers of an encoder that run for a prompt; a vision tower's do not."""
    found = [
        Layers(module, name)
        for module in encoder.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
        and len(child) > 1
        and len(child) == getattr(getattr(module, "config", None), "num_hidden_layers", None)
    ]
    ran: list[nn.Module] = []
    with ExitStack() as hooks:
        for layers in found:
            hooks.enter_context(layers.all[0].register_forward_hook(lambda layer, *_: ran.append(layer)))
        embeddings(pipeline)
    return [layers for layers in found if any(layer is layers.all[0] for layer in ran)]


def _fewest(pipeline: Any, layers: Layers, whole: Sequence[Tensor]) -> int:
    """The least number of layers with which all embeddings are the same."""

    def enough(count: int) -> bool:
        layers.keep(count)
        try:
            return _same(embeddings(pipeline), whole)
        except ModelError:  # there is no hidden state of that number
            return False

    low, high = 1, len(layers.all)
    if not enough(high - 1):  # of most pipelines, which read the last one
        low = high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
