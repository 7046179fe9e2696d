"""Modules with fewer units: feed-forward networks with fewer neurons, attentions with fewer heads.

A unit is what can be cut out of a module whole: its rows in the layers that make it and its columns in those that read
it. A module without a unit computes what the whole one computes with that unit's columns set to zero. Which units stay
is part of a replacement's description, since a LoRA made for the whole module has to be cut the same way.

``narrow`` keeps some hidden neurons of a feed-forward network, plain, gated or convolutional; ``heads`` keeps some
heads of an attention, with grouped queries those of a key and value together; ``parallel`` is both at once where one
layer reads both (the single-stream blocks of FLUX). Norms over one head are shared by all heads and stay; what has a
weight for each feature between the layers (a norm over all heads, a depthwise convolution) is cut along.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.errors import ModelError
from ppcl.modules.parts import check_part, cuts_of

Moment = tuple[Tensor, Tensor]  # mean (h,) and covariance (h, h) of the inputs of a layer
Spans = tuple[tuple[int, int], ...]  # where units lie: the first feature of unit 0, and how many a unit has there
# Numbers of a module that its forward takes heads or neurons from
_OF_HEADS = re.compile(r"(.*_)?heads|inner(_kv)?_dim|sliceable_head_dim")
_OF_NEURONS = re.compile(r"(mlp_)?hidden_(dim|size|features|channels)")


@dataclass(frozen=True)
class Units:
    """The units of one module.

    Attributes:
        kind: ``narrow`` (neurons) or ``heads``.
        count: How many there are.
        rows: Layers that make them, as paths inside the module.
        columns: Layers that read them.
        between: What has weights for each of their features on the way: norms over all heads, depthwise convolutions.
        spans: Where the units lie in layers whose features are not divided among them in the usual way: all of a
            layer's, those of a head side by side, those of a neuron once in each half of a gated layer.
    """

    kind: str
    count: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    between: tuple[str, ...] = ()
    spans: tuple[tuple[str, Spans], ...] = ()

    def part(self, kept: Sequence[int]) -> dict[str, Any]:
        """Describe the replacement that keeps these units."""
        part = {
            "kind": self.kind,
            "size": len(kept),
            "of": self.count,
            "kept": pack_kept(kept, self.count),
            "rows": list(self.rows),
            "columns": list(self.columns),
        }
        if self.between:
            part["between"] = list(self.between)
        if self.spans:
            part["spans"] = {name: [list(span) for span in spans] for name, spans in self.spans}
        return part

    def of_features(self, features: int, layer: str = "") -> np.ndarray[Any, Any]:
        """The unit that each of a layer's features belongs to, (features,); -1 where it belongs to none.

        Raises:
            ModelError: They do not divide into the units.
        """
        spans = dict(self.spans).get(layer) or usual_spans(self.kind, self.count, features)
        units = np.full(features, -1)
        for start, share in spans:
            if start + share * self.count > features:
                raise ModelError(f"{layer} has {features} features, too few for the units of the replacement")
            units[start : start + share * self.count] = np.arange(self.count).repeat(share)
        return units


def usual_spans(kind: str, count: int, features: int) -> Spans:
    """Where units lie in a layer that holds nothing else.

    Raises:
        ModelError: The layer's size is no multiple of the units.
    """
    share, rest = divmod(features, count)
    if rest or not share:
        raise ModelError(f"{features} features do not divide into {count} units; the replacement is for another model")
    return ((0, share),) if kind == "heads" else tuple((half * count, 1) for half in range(share))


def units_from(part: Mapping[str, Any]) -> list[Units]:
    """The units that a replacement is of: one kind, or of a parallel one heads and neurons."""
    return [
        Units(
            cut["kind"],
            int(cut["of"]),
            tuple(cut["rows"]),
            tuple(cut["columns"]),
            tuple(cut.get("between", ())),
            tuple((name, tuple((a, b) for a, b in spans)) for name, spans in cut.get("spans", {}).items()),
        )
        for cut in cuts_of(part)
    ]


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One replacement of several cuts of one module."""
    if len(parts) == 1:
        return parts[0]
    return {"kind": "parallel", "size": sum(part["size"] for part in parts), "cuts": list(parts)}


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


def kept_features(part: Mapping[str, Any], features: int, layer: str = "") -> Tensor:
    """Which of a layer's features stay.

    Args:
        part: The replacement.
        features: Of the whole layer, on the side of the units.
        layer: Its path inside the module; empty for one that the replacement does not name, and that holds the units
            in the usual way.

    Returns:
        Indices, in order.

    Raises:
        ModelError: The layer's size is no multiple of the units.
    """
    return torch.tensor(np.flatnonzero(_stays(part, features, layer)))


def _stays(part: Mapping[str, Any], features: int, layer: str) -> np.ndarray[Any, Any]:
    """Whether each feature of a layer stays. No tensors: modules are built on fake ones, too."""
    stays = np.ones(features, dtype=bool)
    for cut, units in zip(cuts_of(part), units_from(part), strict=True):
        if not layer or layer in (*units.rows, *units.columns, *units.between):
            kept = np.zeros(units.count + 1, dtype=bool)
            kept[[*kept_units(cut), -1]] = True  # the last: what is of no unit
            stays &= kept[units.of_features(features, layer)]
    return stays


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


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer is y = x W^T + b for each token or pixel: a linear layer, or a convolution of one pixel."""
    if type(layer) is not nn.Conv2d:
        return type(layer) is nn.Linear
    return layer.groups == 1 and {*layer.kernel_size, *layer.stride} == {1} and layer.padding in (0, (0, 0), "valid")


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight (o, i) of such a layer."""
    return layer.get_parameter("weight").flatten(1)


def features_last(layer: nn.Module, x: Tensor) -> Tensor:
    """What such a layer is given or gives, (..., features)."""
    return x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x


def scaled(layer: nn.Module, x: Tensor, factors: Tensor) -> Tensor:
    """What such a layer is given, each feature times a factor, (features,) or more axes before."""
    return (
        features_last(layer, x) * factors if type(layer) is nn.Linear else (x.movedim(1, -1) * factors).movedim(-1, 1)
    )


def sliced(module: nn.Module, part: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a module with the kept units alone, and their weights.

    Raises:
        ModelError: The module has no such layers.
    """
    smaller = copy.deepcopy(module)
    slice_units(smaller, part)
    return smaller


def slice_units(module: nn.Module, part: Mapping[str, Any]) -> None:
    """Cut a module in place to the kept units.

    Raises:
        ModelError: The module has no such layers.
    """
    check_part(dict(part))
    cut: dict[str, nn.Module] = {}
    for units in units_from(part):
        for name in (*units.rows, *units.columns, *units.between):
            side = 1 if name in units.columns else 0
            old = _layer_with_units(module, name, units, side)
            if name not in cut:
                cut[name] = _smaller(old, kept_features(part, old.get_parameter("weight").shape[side], name), side)
        if units.kind == "heads" and int(getattr(module, "heads", units.count)) % units.count:
            raise ModelError(f"{type(module).__name__} has not the {units.count} heads of its replacement")
    for name, layer in cut.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer)
    for one in cuts_of(part):
        parents = [name.rpartition(".")[0] for name in (*one["rows"], *one["columns"])]
        paths = {"", *(parent.rsplit(".", up)[0] for parent in parents for up in range(parent.count(".") + 1))}
        for path in paths:
            _count_again(module.get_submodule(path), one)


def _count_again(module: nn.Module, part: Mapping[str, Any]) -> None:
    """Let the numbers of a module say how many heads or neurons there are now."""
    size, count = int(part["size"]), int(part["of"])
    for name, value in vars(module).items():
        if type(value) is not int or value % count:
            continue
        if part["kind"] == "heads" and _OF_HEADS.fullmatch(name):
            setattr(module, name, value // count * size)
        elif part["kind"] == "narrow" and _OF_NEURONS.fullmatch(name) and value == count:
            setattr(module, name, size)


def _layer_with_units(module: nn.Module, name: str, units: Units, side: int) -> nn.Module:
    """The layer that makes (side 0) or reads (side 1) as many units as a replacement is of."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        layer = None
    weight = getattr(layer, "weight", None)
    is_between = name in units.between and isinstance(weight, Tensor)
    if layer is None or not (is_matrix(layer) or is_between):
        raise ModelError(f"{type(module).__name__} has no linear layer '{name}' to make smaller")
    features, usual = layer.get_parameter("weight").shape[side], name not in dict(units.spans)
    if usual and (features % units.count if units.kind == "heads" else features not in (units.count, 2 * units.count)):
        raise ModelError(
            f"{type(module).__name__}.{name} has not the {units.count} units of the replacement '{units.kind}', which "
            "is for another model"
        )
    units.of_features(features, name)
    return layer


def _smaller(old: nn.Module, index: Tensor, side: int) -> nn.Module:
    """A layer with the rows (side 0) or columns (side 1) of some features."""
    kept, weight = len(index), old.get_parameter("weight")
    smaller = copy.deepcopy(old, {id(p): p for p in old.parameters()})  # no second copy of the weights
    sizes = ["in_features", "in_channels"] if side else ["out_features", "out_channels"]
    for name in sizes if is_matrix(old) else ("in_channels", "out_channels", "groups"):
        if hasattr(old, name):
            setattr(smaller, name, kept)
    for name in ("normalized_shape", "dim"):
        if hasattr(old, name) and not is_matrix(old):
            setattr(smaller, name, type(getattr(old, name))((kept,)) if name != "dim" else torch.Size((kept,)))
    for name, parameter in old.named_parameters(recurse=False):
        cut = parameter.detach()
        if parameter.ndim > side and (name == "weight" or side == 0):
            cut = cut.index_select(side, index.to(weight.device))
        elif name != "weight":
            cut = cut.clone()
        setattr(smaller, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    return smaller


@torch.no_grad()
def masked(module: nn.Module, part: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a module in which nothing reads the units that a replacement drops.

    Where a norm lies between, nothing makes them either: it would see them.
    """
    copied = copy.deepcopy(module)
    for units in units_from(part):
        layers = {name: 1 for name in units.columns} | ({name: 0 for name in units.rows} if units.between else {})
        for name, side in layers.items():
            for parameter in copied.get_submodule(name).parameters():
                if parameter.ndim > side:
                    dropped = np.flatnonzero(~_stays(part, parameter.shape[side], name))
                    parameter.index_fill_(side, torch.tensor(dropped, device=parameter.device), 0.0)
    return copied


def corrected(
    weight: Tensor,
    bias: Tensor | None,
    part: Mapping[str, Any],
    moment: Moment,
    ridge: float = 1e-4,
    layer: str = "",
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
        layer: The layer's path inside the module.

    Returns:
        Weight (o, kept) and bias, float64.
    """
    mean, covariance = (m.to(weight.device).double() for m in moment)
    whole = weight.double()
    keep = kept_features(part, whole.shape[1], layer).to(weight.device)
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
    names = [name for units in units_from(part) for name in (*units.rows, *units.columns, *units.between)]
    for name in dict.fromkeys(names):
        for kind, parameter in smaller.get_submodule(name).named_parameters(recurse=False):
            parameter.copy_(state[f"{name}.{kind}"].view_as(parameter))
