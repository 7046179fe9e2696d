"""Families of diffusion transformers. A new one is a file like ``qwenimage.py`` and an entry here."""

from torch import nn

from ppcl.adapters.base import Adapter, StackSpec, States
from ppcl.adapters.flux import FLUX
from ppcl.adapters.qwenimage import QWEN_IMAGE
from ppcl.errors import ModelError

__all__ = ["ADAPTERS", "Adapter", "StackSpec", "States", "adapter_for"]

ADAPTERS: dict[str, Adapter] = {name: adapter for adapter in (QWEN_IMAGE, FLUX) for name in adapter.classes}


def adapter_for(transformer: nn.Module) -> Adapter:
    """Return the adapter of a transformer, by its class or the diffusers class it derives from.

    Raises:
        ModelError: The family is not supported.
    """
    for kind in type(transformer).__mro__:
        if kind.__name__ in ADAPTERS:
            return ADAPTERS[kind.__name__]
    raise ModelError(
        f"{type(transformer).__name__} is not supported yet; supported: {', '.join(sorted(ADAPTERS))}. "
        "An adapter for it is a file of about 20 lines, see README"
    )
