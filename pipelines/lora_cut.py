"""A LoRA made for a module, on the same module with fewer neurons or heads.

The update of a layer is B A. A layer that makes units lost rows, and with them rows of B; one that
reads them lost columns, and with them columns of A. What is left acts on the kept units as before.

Two kinds cannot be cut. A LoKr is a Kronecker product, whose factors have no rows of single units. A DoRA gives whole
rows of weights their length, and the length of a row that lost columns follows from columns that are gone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ppcl.modules.parts import SLICED, cuts_of

if TYPE_CHECKING:
    from torch import Tensor

_OUT = re.compile(r"\.(?:lora_B|lora_up|lora\.up|lora_magnitude_vector|dora_scale)(?:\.|$)")
_IN = re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.|$)")
_PRODUCT = re.compile(r"\.lokr_")


def fit_replaced(
    tensor: Tensor, name: str, replaced: Collection[str] | Mapping[str, Mapping[str, Any]], is_dora: bool = False
) -> tuple[Tensor | None, str, bool]:
    """Make a tensor of a LoRA fit where modules were replaced by smaller ones.

    Args:
        tensor: Any tensor of a LoRA.
        name: Its key in the compressed transformer.
        replaced: Paths of the smaller modules, or the config's ``pruning``.
        is_dora: Whether its layer has DoRA's magnitudes.

    Returns:
        The tensor, None if nothing is left for it to act on; the smaller module it belongs to, if any; and whether
        it was cut.
    """
    path = max((p for p in replaced if name.startswith(f"{p}.")), key=len, default="")  # the innermost
    part = replaced[path] if path and isinstance(replaced, Mapping) else {}
    if not path or part.get("kind") not in SLICED:
        return (None if path else tensor), path, False
    inside = name.removeprefix(f"{path}.")
    readers = [layer for cut in cuts_of(part) for layer in cut["columns"]]
    if _PRODUCT.search(inside) or (is_dora and any(inside.startswith(f"{layer}.") for layer in readers)):
        return None, path, False
    cut, changed = cut_lora(tensor, inside, part)
    return cut, path, changed


def cut_lora(tensor: Tensor, name: str, part: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Cut one tensor of a LoRA to the units that a module kept.

    Args:
        tensor: (r, d) of A, (o, r) of B, (o,) or (o, 1) of DoRA's magnitudes; anything else stays.
        name: Its key inside the module, such as ``net.2.lora_A.weight``.
        part: The module's entry in the config's ``pruning``.

    Returns:
        The tensor, and whether it was cut.

    Raises:
        ModelError: Its size does not divide into the units.
    """
    from ppcl.modules.slicing import kept_features

    for pattern, axis, side in ((_OUT, 0, "rows"), (_IN, 1, "columns")):
        layers = [layer for cut in cuts_of(part) for layer in cut[side] if name.startswith(f"{layer}.")]
        if layers and pattern.search(name) and tensor.ndim > axis:
            index = kept_features(part, tensor.shape[axis], layers[0]).to(tensor.device)
            return tensor.index_select(axis, index), True
    return tensor, False
