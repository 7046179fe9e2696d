"""Families of diffusion transformers. A new one is a file like ``qwenimage.py`` and an entry here."""

from torch import nn

from ppcl.adapters.base import Adapter, StackSpec, States
from ppcl.adapters.flux import FLUX
from ppcl.adapters.qwenimage import QWEN_IMAGE
from ppcl.errors import ModelError

__all__ = ["ADAPTERS", "Adapter", "StackSpec", "States", "adapter_class", "adapter_for"]

ADAPTERS: dict[str, Adapter] = {name: adapter for adapter in (QWEN_IMAGE, FLUX) for name in adapter.classes}


def adapter_for(transformer: nn.Module) -> Adapter:
    """Return the adapter of a transformer, by its class or the diffusers class it derives from.

    Raises:
        ModelError: The family is not supported.
    """
    return adapter_class(type(transformer))


def adapter_class(transformer_class: type) -> Adapter:
    """Return the adapter of a transformer class, see :func:`adapter_for`."""
    for kind in transformer_class.__mro__:
        if kind.__name__ in ADAPTERS:
            return ADAPTERS[kind.__name__]
    raise ModelError(
        f"{transformer_class.__name__} is not supported yet; supported: {', '.join(sorted(ADAPTERS))}. "
        "An adapter for it is a file of about 20 lines, see README"
    )
