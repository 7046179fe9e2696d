"""Which config gives the stock class of a family a student's narrower networks, where all have one width."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ppcl.config.names import PREFIX
from ppcl.modules.parts import one_share
from ppcl.teacher.families import Adapter

UNFIT = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
)  # what constructors raise for a width that their class cannot have


def stock_fields(model: Any, adapter: Adapter, pruning: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Find the config fields by which a model's own class has the networks that it has.

    A value counts where the class builds the model's very shapes from it: a field may set networks that are whole here.

    Args:
        model: With smaller modules, and a config of the whole ones at the depth that it has; weights are not read.
        adapter: Its family.
        pruning: All its smaller modules by path.

    Returns:
        The fields; empty if there are none, or something else than networks' neurons is smaller.
    """
    share = one_share(pruning)
    if share is None or not adapter.ffn_field or type(model).__name__.startswith(PREFIX):
        return {}
    # what begins with _ is diffusers' own: names of defaults among it, for which given values would not count
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    name = adapter.ffn_field
    whole = config[name] or 1  # Lumina-Next's multiplier is None for 1
    values = [whole * share, Fraction(whole) * share * (1 + Fraction(1, 1_000_000))]  # classes round ratios down
    for value in values:
        given = int(value) if isinstance(whole, int) and value == int(value) else float(value)
        if shapes_of(type(model), {**config, name: given}) == _shapes(model):
            return {name: given}
    return {}


def shapes_of(kind: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Shapes of the weights that a class builds from a config; None if it builds nothing."""
    try:
        with torch.device("meta"):
            return _shapes(kind.from_config(dict(config)))
    except UNFIT:
        return None


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
