"""AdamW with states of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), as torchao has it, and its states in files.

A state of a large weight is a tensor of codes with one scale for each block of 256 and a table; of weights below 4096
numbers it stays float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.optional import optional_module

_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def new_adamw8bit(
    parameters: Iterable[nn.Parameter], rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Torchao's AdamW8bit.

    Raises:
        UserError: torchao is not installed.
    """
    torchao = optional_module("torchao.optim", "distill.optimizer=adamw8bit", "int8", "set adamw")
    optimizer: torch.optim.Optimizer = torchao.AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=weight_decay)
    return optimizer


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a parameter group's learning rate; torchao compiles its step and wants a tensor that stays the same."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def plain_states(slots: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's states of one weight as plain tensors, for a file: ``exp_avg.codes`` and so on."""
    tensors: dict[str, Tensor] = {}
    for slot, value in slots.items():
        names = getattr(value, "tensor_attrs", None)
        tensors |= {f"{slot}.{name}": getattr(value, name) for name in names} if names else {slot: value}
    return tensors


def joined_states(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`plain_states`."""
    states: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        slot, _, part = name.partition(".")
        if not part:
            states[slot] = tensor
        elif part == "codes":
            from torchao.optim.subclass_8bit import OptimState8bit

            scale, table = plain[f"{slot}.scale"], plain[f"{slot}.qmap"]
            states[slot] = OptimState8bit(tensor, scale, table, _SIGNED[slot], torch.float32)
    return states
