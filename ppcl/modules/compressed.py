"""Transformer classes with smaller modules inside their blocks.

``PPCLQwenImageTransformer2DModel`` is ``QwenImageTransformer2DModel`` with one more config
entry, ``pruning``, which names the modules that are smaller. It rebuilds them in ``__init__``,
has a ``select`` for bundles, refuses IP-Adapters that were not made to fit, and overrides nothing else, so that hooks,
caches, compilation and quantisation see the class that they know. Plans of depth alone need none of this.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import diffusers
from diffusers.configuration_utils import register_to_config

from ppcl.config.names import PREFIX
from ppcl.errors import ModelError
from ppcl.modules.replacements import apply_width

MODULE = "transformer_ppcl"  # diffusers looks for MODULE.py in the folder of a component whose code went along


@cache
def compressed_class(base: Any) -> Any:
    """Return the class of transformers of ``base`` with smaller modules.

    Args:
        base: A diffusers transformer class (a type); a class that this function made is returned as it is.
    """
    if base.__name__.startswith(PREFIX):
        return base

    def __init__(self: Any, *args: Any, pruning: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        apply_width(self, pruning or {})

    def select(self: Any, **choice: Any) -> tuple[str, ...]:
        """Change the size in place; see :meth:`ppcl.pipelines.bundle.Plugboard.select`."""
        board = self.__dict__.get("plugboard")
        if board is None:
            raise ModelError("this transformer has one size; load the run with ppcl.pipelines.load_bundle to change it")
        paths: tuple[str, ...] = board.select(**choice)
        return paths

    def refuse_ip_adapter(self: Any, *_: Any, **__: Any) -> None:
        raise ModelError(
            "an IP-Adapter made for the teacher does not fit what is smaller here; load it with "
            "ppcl.pipelines.load_ip_adapter(pipe, ...), which gives each block its own layer, cut to its heads"
        )

    signature = inspect.signature(base.__init__)
    entry = inspect.Parameter("pruning", inspect.Parameter.KEYWORD_ONLY, default=None)
    # diffusers reads the names of the config's entries off the signature
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), entry])  # type: ignore[attr-defined]
    members = {
        "__init__": register_to_config(__init__),  # type: ignore[no-untyped-call]
        "select": select,
        "__module__": "diffusers",  # so that a pipeline's model_index.json names a library that it finds
        "__doc__": f"{base.__name__} with the smaller modules that its ``pruning`` config entry names.",
    }
    if hasattr(base, "_load_ip_adapter_weights"):
        members["_load_ip_adapter_weights"] = refuse_ip_adapter
    return type(PREFIX + base.__name__, (base,), members)


def compress_class(transformer: Any, pruning: Mapping[str, Mapping[str, Any]]) -> None:
    """Turn a transformer whose modules were replaced into one of the compressed class.

    Args:
        transformer: Changed in place; its modules are those that ``pruning`` describes.
        pruning: Path -> kind and size of every smaller module.
    """
    kind: Any = type(transformer)
    transformer.__class__ = compressed_class(kind)
    transformer.register_to_config(pruning={path: dict(part) for path, part in pruning.items()})


def register(names: Iterable[str]) -> None:
    """Make the compressed classes of some families known to diffusers, so that pipelines load.

    A pipeline whose code went along names ``MODULE`` as its transformer's library. diffusers looks for it among its
    pipelines before it looks for code in the folder, so that such a pipeline loads without ``trust_remote_code=True``.

    Args:
        names: Of diffusers' transformer classes; those of another version of diffusers are passed over.
    """
    from diffusers import pipelines
    from diffusers.loaders import peft

    sys.modules.setdefault(MODULE, diffusers)  # where a transformer is passed to from_pretrained
    setattr(pipelines, MODULE, diffusers)
    scales = getattr(peft, "_SET_ADAPTER_SCALE_FN_MAPPING", {})
    for name in names:
        base = getattr(diffusers, name, None)
        if base is None:
            continue
        compressed = compressed_class(base)
        setattr(diffusers, compressed.__name__, compressed)
        if name in scales:  # LoRA scales are looked up by class name
            scales.setdefault(compressed.__name__, scales[name])
