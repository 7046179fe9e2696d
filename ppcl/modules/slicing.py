"""Modules with fewer units: feed-forward networks with fewer neurons, attentions with fewer heads.

A unit is what can be cut out of a module whole: its rows in the linear layers that make it and
its columns in those that read it. A module without a unit computes what the whole one computes
with that unit's columns set to zero. Which units stay is part of a replacement's description,
since a LoRA made for the whole module has to be cut the same way.

``narrow`` keeps some hidden neurons of a feed-forward network, plain or gated; ``heads`` keeps
some heads of an attention, whose QK norms are shared by all heads and stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import ModelError
from ppcl.modules.parts import check_part

Moment = tuple[Tensor, Tensor]  # mean (h,) and covariance (h, h) of the inputs of a linear layer
_IN = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_OUT = ("to_out.0", "to_add_out")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Units:
    """The units of one module.

    Attributes:
        kind: ``narrow`` (neurons) or ``heads``.
        count: How many there are.
        rows: Linear layers that make them, as paths inside the module.
        columns: Linear layers that read them.
    """

    kind: str
    count: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def part(self, kept: Sequence[int]) -> dict[str, Any]:
        """Describe the replacement that keeps these units."""
        return {
            "kind": self.kind,
            "size": len(kept),
            "of": self.count,
            "kept": pack_kept(kept, self.count),
            "rows": list(self.rows),
            "columns": list(self.columns),
        }


def pack_kept(kept: Sequence[int], count: int) -> str:
    """Write a set of units as a hexadecimal bit mask, unit 0 in the lowest bit: 3 kB for 12,288 neurons."""
    mask = 0
    for unit in kept:
        mask |= 1 << unit
    return f"{mask:0{-(-count // 4)}x}"


def kept_units(part: Mapping[str, Any]) -> list[int]:
    """Numbers of the units that a replacement keeps, in order.

    Raises:
        ModelError: They are not as many as it says.
    """
    check_part(dict(part))
    bits = f"{int(part['kept'], 16):b}"[::-1]
    return [unit for unit, bit in enumerate(bits) if bit == "1"]


def features_of_units(part: Mapping[str, Any], features: int, units: Sequence[int] | None = None) -> Tensor:
    """Which of a layer's features belong to the kept units.

    Args:
        part: The replacement.
        features: Of the whole layer, on the side of the units: a head's lie side by side; a gated network's first
            layer makes two features a neuron, in two halves.
        units: Other units than the kept ones.

    Returns:
        Indices, in order.

    Raises:
        ModelError: The layer's size is no multiple of the units.
    """
    count, kept = int(part["of"]), torch.tensor(kept_units(part) if units is None else list(units), dtype=torch.long)
    share, rest = divmod(features, count)
    if rest or not share:
        raise ModelError(f"{features} features do not divide into {count} units; the replacement is for another model")
    if part["kind"] == "heads":
        return (kept[:, None] * share + torch.arange(share)).flatten()
    return (torch.arange(share)[:, None] * count + kept).flatten()


def neurons_of(module: nn.Module) -> Units | None:
    """The neurons of a feed-forward network, as far as its linear layers tell; None if they do not.

    Layers that read the network's input make the neurons, the one that does not reads them. Plain: one layer of h
    features; gated: two of h, or one of 2 h.
    """
    layers = {name: m for name, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None}
    if not layers or any(type(m) is not nn.Linear for m in layers.values()):
        return None
    linears = {name: m for name, m in layers.items() if isinstance(m, nn.Linear)}
    inputs = next(iter(linears.values())).in_features
    rows = {name: m for name, m in linears.items() if m.in_features == inputs}
    columns = [name for name in linears if name not in rows]
    if len(columns) != 1:
        return None
    hidden = linears[columns[0]].in_features
    widths = sorted(m.out_features for m in rows.values())
    if widths not in ([hidden], [2 * hidden], [hidden, hidden]):
        return None
    return Units("narrow", hidden, tuple(rows), tuple(columns))


def heads_of(module: nn.Module) -> Units | None:
    """The heads of an attention of diffusers' ordinary kind; None if it is of another.

    As many heads for keys and values as for queries, QK norms over one head, plain output layers, nothing else that
    has weights.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    if not isinstance(module, Attention | AttentionModuleMixin) or getattr(module, "fused_projections", False):
        return None
    count = int(getattr(module, "heads", 0) or 0)
    weighted = {name: m for name, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None}
    rows = tuple(name for name in _IN if name in weighted)
    columns = tuple(name for name in _OUT if name in weighted)
    if count < 2 or "to_out.0" not in columns or not {"to_q", "to_k", "to_v"} <= set(rows):
        return None
    if set(weighted) - {*rows, *columns, *_NORMS} or any(type(weighted[n]) is not nn.Linear for n in (*rows, *columns)):
        return None
    width, rest = divmod(weighted["to_q"].get_parameter("weight").shape[0], count)
    inner = {weighted[n].get_parameter("weight").shape[0] for n in rows}
    inner |= {weighted[n].get_parameter("weight").shape[1] for n in columns}
    norms = (p for n in _NORMS if n in weighted for p in weighted[n].parameters())
    if rest or inner != {count * width} or any(p.numel() != width for p in norms):
        return None
    return Units("heads", count, rows, columns)


def sliced(module: nn.Module, part: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a module with the kept units alone, and their weights.

    Raises:
        ModelError: The module has no such layers.
    """
    check_part(dict(part))
    smaller = copy.deepcopy(module)
    if part["kind"] == "heads" and getattr(module, "heads", part["of"]) != part["of"]:
        raise ModelError(f"{type(module).__name__} has not the {part['of']} heads of its replacement")
    for names, side in ((part["rows"], 0), (part["columns"], 1)):
        for name in names:
            parent, _, last = name.rpartition(".")
            old = _layer_with_units(smaller, name, part, side)
            setattr(smaller.get_submodule(parent), last, _smaller(old, part, side))
    if part["kind"] == "heads":
        for name in ("inner_dim", "inner_kv_dim"):
            if hasattr(smaller, name):
                setattr(smaller, name, getattr(smaller, name) // int(part["of"]) * int(part["size"]))
        for name in ("heads", "sliceable_head_dim"):
            if hasattr(smaller, name):
                setattr(smaller, name, int(part["size"]))
    return smaller


def _layer_with_units(module: nn.Module, name: str, part: Mapping[str, Any], side: int) -> nn.Linear:
    """The linear layer that makes (side 0) or reads (side 1) as many units as a replacement is of."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{type(module).__name__} has no linear layer '{name}' to make smaller")
    features, count = (layer.out_features, layer.in_features)[side], int(part["of"])
    valid = (count, 2 * count) if side == 0 else (count,)
    if features % count if part["kind"] == "heads" else features not in valid:
        raise ModelError(
            f"{type(module).__name__}.{name} has not the {count} units of the replacement '{part['kind']}', which is "
            "for another model"
        )
    return layer


def _smaller(old: nn.Linear, part: Mapping[str, Any], side: int) -> nn.Linear:
    """A linear layer with the rows (side 0) or columns (side 1) of the kept units."""
    index = features_of_units(part, old.weight.shape[side]).to(old.weight.device)
    shape = [old.in_features, old.out_features]
    shape[1 - side] = len(index)
    linear = nn.Linear(shape[0], shape[1], bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    if old.weight.is_meta or linear.weight.is_meta:  # being built without weights, which come from a file
        return linear
    with torch.no_grad():
        linear.weight.copy_(old.weight.index_select(side, index))
        if old.bias is not None:
            linear.bias.copy_(old.bias[index] if side == 0 else old.bias)
    return linear


@torch.no_grad()
def masked(module: nn.Module, part: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a module in which nothing reads the units that a replacement drops."""
    copied = copy.deepcopy(module)
    kept = set(kept_units(part))
    dropped = [unit for unit in range(int(part["of"])) if unit not in kept]
    for name in part["columns"]:
        weight = copied.get_submodule(name).get_parameter("weight")
        weight[:, features_of_units(part, weight.shape[1], dropped)] = 0
    return copied


def corrected(
    weight: Tensor, bias: Tensor | None, part: Mapping[str, Any], moment: Moment, ridge: float = 1e-4
) -> tuple[Tensor, Tensor | None]:
    """Columns that make up for what the dropped ones gave, by least squares on the inputs that occur.

    With h the inputs, S the kept and D the dropped features and C their covariance: W'_S = W_S + W_D C_DS
    (C_SS + ridge)^-1, and the bias keeps the mean output. The ridge pulls towards the plain cut.

    Args:
        weight: (o, h) of the whole layer.
        bias: (o,) or None; then the layer's outputs keep no mean, and second moments stand for C.
        part: The replacement.
        moment: Mean and covariance of h.
        ridge: Relative to the mean variance of the kept features.

    Returns:
        Weight (o, kept) and bias, float64.
    """
    mean, covariance = (m.to(weight.device).double() for m in moment)
    whole = weight.double()
    keep = features_of_units(part, whole.shape[1]).to(weight.device)
    drop = torch.ones(whole.shape[1], dtype=torch.bool, device=weight.device)
    drop[keep] = False
    if bias is None:
        covariance = covariance + torch.outer(mean, mean)
    inner = covariance[keep][:, keep]
    scale = inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    inner.diagonal().add_(ridge * scale)
    maps = torch.linalg.solve(inner, covariance[keep][:, drop])
    kept_weight = whole[:, keep] + whole[:, drop] @ maps.T
    if bias is None:
        return kept_weight, None
    return kept_weight, bias.double() + whole[:, drop] @ (mean[drop] - maps.T @ mean[keep])


@torch.no_grad()
def fill_sliced(
    smaller: nn.Module, original: nn.Module, part: Mapping[str, Any], layers: Mapping[str, Tensor] | None = None
) -> None:
    """Give a module of fewer units the whole one's weights and, where they are known, its corrected columns.

    Args:
        smaller: Changed in place.
        original: The whole module.
        part: The replacement.
        layers: Corrected weights by name inside the module; the plain cut where there are none.
    """
    state = {**sliced(original, part).state_dict(), **(layers or {})}
    smaller.load_state_dict({name: value for name, value in state.items() if name in smaller.state_dict()})
