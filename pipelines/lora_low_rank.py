"""LoRA of a layer that is of low rank now: y = up(down(x)), which stands for W x.

The teacher's LoRA adds s B A to W. Only what the columns of ``up`` span can leave the layer, so there
are two ways (measured in docs/adapters_bridge.md: widening is exact, folding keeps little):

* *widen*: ``up`` gets the columns of B and ``down`` as many rows of zeros, so the layer says what it said;
  the LoRA on ``down`` is [0; I] A, which fills those rows. It costs what the LoRA itself does, and the layer
  stays wider, to no effect, when the LoRA is unloaded.
* *fold* (the layer keeps its shape): the LoRA goes to ``down`` as (up+ B) A, with the pseudo-inverse of
  ``up``. Where the closed form left up = U with orthonormal columns that is (U^T B) A, and the layer's
  output moves by U U^T B A x: the part of the update inside the span, the nearest that there is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ppcl.errors import ModelError, UserError

if TYPE_CHECKING:
    from torch import Tensor

HOW = ("fold", "widen")
INNER = "down"  # the part of a low-rank layer that takes the LoRA
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<side>A|B|down|up)(?P<rest>(?:\.\w+)*?\.(?:weight|bias))$")
_OTHER_KINDS = re.compile(r"dora_scale|lora_magnitude|lokr_|lora_mid|hada_")


def low_rank_paths(pruning: Mapping[str, Mapping[str, Any]], names: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of the layers of low rank that can take a LoRA.

    Args:
        pruning: The compressed transformer's config entry.
        names: The LoRA's keys. What is more than two factors (DoRA, LoKr) fits no low-rank layer: none then.
    """
    if any(_OTHER_KINDS.search(name) for name in names):
        return ()
    return tuple(path for path, part in pruning.items() if part["kind"] == "low_rank")


def fold(tensors: Mapping[str, Tensor], transformer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Project the LoRA of low-rank layers onto what those layers can say.

    Args:
        tensors: A LoRA whose keys name ``<layer>.down`` with the factors of the whole layer: A (k, d), B (o, k).
        transformer: Has the low-rank layers.

    Returns:
        The tensors with B (r, k) in those places, and for each layer the share ||P B A|| / ||B A|| (Frobenius) of the
        update that stays, P the projection onto the span of ``up``.

    Raises:
        UserError: A factor has another number of features than the layer.
        ModelError: The layer's weights are not in memory.
    """
    import torch

    out, shares = dict(tensors), {}
    for path, (keys_a, keys_b) in _pairs(tensors, transformer).items():
        up = plain_weight(transformer.get_submodule(path).up.weight.detach(), path).double().cpu()
        inverse = torch.linalg.pinv(up)
        for key in keys_b:
            whole = tensors[key].double().cpu()
            if len(whole) != len(up):
                raise UserError(
                    f"'{key}' has {len(whole)} out_features, but the layer has {len(up)}; "
                    "the LoRA was made for a model of another width"
                )
            out[key] = (inverse @ whole).to(tensors[key])
            if whole.ndim == 2:
                a = tensors[keys_a[0]].double().cpu()
                total = (whole @ a).norm()
                shares[path] = float((up @ (inverse @ whole) @ a).norm() / total) if total else 1.0
    return out, shares


def widen(tensors: Mapping[str, Tensor], transformer: Any) -> dict[str, Tensor]:
    """Make low-rank layers wide enough for their LoRA, which then acts exactly.

    Args:
        tensors: As for :func:`fold`.
        transformer: Changed in place, with its config: each layer's rank grows by the LoRA's.

    Returns:
        The tensors for the wider layers.

    Raises:
        ModelError: A layer's weights cannot be rewritten (quantised, or offloaded).
        UserError: The LoRA trained a bias of such a layer.
    """
    import torch

    out, pairs = dict(tensors), _pairs(tensors, transformer)
    pruning = {path: dict(part) for path, part in (transformer.config.get("pruning") or {}).items()}
    for path, (_, keys_b) in pairs.items():
        layer = transformer.get_submodule(path)
        if not all(_is_plain(part) for part in (_base(layer.down), layer.up)):
            raise ModelError(
                f"'{path}' is quantised or offloaded and cannot be widened; load this LoRA before that, or with "
                "low_rank='fold'"
            )
        if len(keys_b) != 1:
            raise UserError(f"the LoRA trained a bias of '{path}', which only low_rank='fold' can take")
    for path, (_, keys_b) in pairs.items():
        layer = transformer.get_submodule(path)
        b = tensors[keys_b[0]].to(layer.up.weight)
        rank, more = layer.up.in_features, b.shape[1]
        wrapped = [*layer.down.lora_B.values()] if layer.down is not _base(layer.down) else []
        for part in (_base(layer.down), *wrapped):  # the LoRA that are there already say nothing in the new rows
            zeros = part.weight.new_zeros(more, part.in_features)
            _set_weight(part, torch.cat([part.weight.detach(), zeros]))
        if wrapped:
            layer.down.out_features += more
        _set_weight(layer.up, torch.cat([layer.up.weight.detach(), b], 1))
        pruning[path]["size"] = rank + more
        out[keys_b[0]] = torch.cat([b.new_zeros(rank, more), torch.eye(more).to(b)])
    if pairs:
        transformer.register_to_config(pruning=pruning)
    return out


def plain_weight(weight: Tensor, path: str) -> Tensor:
    """The numbers behind a weight, quantised ones as well."""
    import torch

    if weight.is_meta:
        raise ModelError(f"the weights of '{path}' are offloaded; load this LoRA before that")
    return weight if type(weight) in (torch.Tensor, torch.nn.Parameter) else weight.dequantize()


def _base(layer: Any) -> Any:
    """A linear layer itself, or the one inside PEFT's."""
    return getattr(layer, "base_layer", layer)


def _is_plain(layer: Any) -> bool:
    import torch

    return type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter and not layer.weight.is_meta


def _set_weight(layer: Any, weight: Tensor) -> None:
    import torch

    layer.weight = torch.nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape


def _pairs(tensors: Mapping[str, Tensor], transformer: Any) -> dict[str, tuple[list[str], list[str]]]:
    """Keys of A and of B (with its bias) for each low-rank layer that the LoRA has."""
    paths = {p for p, part in (transformer.config.get("pruning") or {}).items() if part["kind"] == "low_rank"}
    pairs: dict[str, tuple[list[str], list[str]]] = {}
    for key in tensors:
        match = _LORA.match(key)
        path = match["module"].removeprefix("transformer.").removesuffix(f".{INNER}") if match else ""
        if match and path in paths:
            pairs.setdefault(path, ([], []))[match["side"] in ("B", "up")].append(key)
    return pairs
