"""The heads of an ordinary attention without a call of its block, for tests that cut one."""

from __future__ import annotations

from torch import nn

from ppcl.modules.slicing import Units

ROWS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
COLUMNS = ("to_out.0", "to_add_out")


def heads_of(module: nn.Module) -> Units | None:
    """The heads of a module of diffusers' usual names; None where it is another, or heads share more than norms."""
    layers = {name: m for name, m in module.named_modules() if type(m) is nn.Linear}
    count = getattr(module, "heads", 0)
    if count < 2 or not {"to_q", "to_k", "to_v", "to_out.0"} <= set(layers) or set(layers) - {*ROWS, *COLUMNS}:
        return None
    inner = {len(m.weight) for name, m in layers.items() if name in ROWS}
    norms = (p for name, p in module.named_parameters() if "norm" in name)
    if len(inner) > 1 or any(p.numel() * count != next(iter(inner)) for p in norms):
        return None
    return Units("heads", count, *(tuple(n for n in names if n in layers) for names in (ROWS, COLUMNS)))
