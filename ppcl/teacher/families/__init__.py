"""Families of diffusion transformers: which are supported, which are refused, and what to make of the rest.

A simple family is a line in ``table.py``, any other a file like ``qwenimage.py`` and an
entry here; either way a tiny model of it goes into the test suite. A class that is in
neither table is inferred from its source (``generic.py``) and checked on its first call.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ppcl.errors import ModelError
from ppcl.teacher.families.base import Adapter, StackSpec, States
from ppcl.teacher.families.flux import FLUX
from ppcl.teacher.families.generic import check_adapter, infer
from ppcl.teacher.families.qwenimage import QWEN_IMAGE
from ppcl.teacher.families.refused import REFUSED
from ppcl.teacher.families.sd3 import SD3
from ppcl.teacher.families.table import FAMILIES

__all__ = [
    "ADAPTERS",
    "REFUSED",
    "Adapter",
    "StackSpec",
    "States",
    "adapter_class",
    "adapter_for",
    "check_inferred",
    "fixed_tail",
]

logger = logging.getLogger(__name__)

ADAPTERS: dict[str, Adapter] = {
    name: adapter for adapter in (QWEN_IMAGE, FLUX, SD3, *FAMILIES) for name in adapter.classes
}


def adapter_for(transformer: nn.Module) -> Adapter:
    """Return the adapter of a transformer, by its class or the diffusers class it derives from.

    Raises:
        ModelError: The family is not supported.
    """
    return adapter_class(type(transformer))


def adapter_class(transformer_class: type) -> Adapter:
    """Return the adapter of a transformer class: the tested one, or the one its source tells.

    Raises:
        ModelError: The class is refused, or its source leaves a question open.
    """
    for kind in transformer_class.__mro__:
        if kind.__name__ in ADAPTERS:
            return ADAPTERS[kind.__name__]
        if kind.__name__ in REFUSED:
            raise _unsupported(transformer_class, REFUSED[kind.__name__])
    try:
        adapter = infer(transformer_class)
    except ModelError as error:
        raise _unsupported(transformer_class, str(error)) from None
    lists = ", ".join(f"{stack.name} ({stack.count_field})" for stack in adapter.stacks)
    logger.warning(
        "%s is not among the tested families; its block lists were inferred: %s", transformer_class.__name__, lists
    )
    return adapter


def check_inferred(transformer: nn.Module, arguments: Mapping[str, Any], samples: int) -> None:
    """Check an inferred adapter on one call of ``samples`` samples; tested families pass unchecked.

    Raises:
        ModelError: See :func:`ppcl.teacher.families.generic.check_adapter`.
    """
    if not any(kind.__name__ in ADAPTERS for kind in type(transformer).__mro__):
        check_adapter(transformer, adapter_for(transformer), arguments, samples)


def fixed_tail(transformer: nn.Module, stack: str) -> list[nn.Module]:
    """Return the last blocks of a list that stay as they are, see :class:`StackSpec`."""
    known = (ADAPTERS[kind.__name__] for kind in type(transformer).__mro__ if kind.__name__ in ADAPTERS)
    specs = (spec for adapter in known for spec in adapter.stacks if spec.name == stack)
    count = next(specs, StackSpec("", "", {}, ())).fixed_tail
    return list(getattr(transformer, stack))[-count:] if count else []


def _unsupported(transformer_class: type, reason: str) -> ModelError:
    return ModelError(
        f"{transformer_class.__name__} is not supported yet: {reason}; ppcl families lists what is, "
        "and docs/extending.md says how to add a family"
    )
