"""Where a run computes and in which precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ppcl.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device, of CUDA with its number.

    Raises:
        UserError: The device is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is None:  # "cuda" is not equal to the "cuda:0" of tensors there
            device = torch.device("cuda", torch.cuda.current_device())
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); use --set device=cpu, cuda or auto") from None
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a run: ``bf16``, ``fp32``, or ``auto`` (bf16 on CUDA alone).

    Not accelerate's, which has one device and one precision for all of a program.
    """
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def weights_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """What a teacher's weights are loaded in: bfloat16, but float32 on a CPU and where ``fp32`` is asked for."""
    return torch.float32 if device.type == "cpu" or precision == "fp32" else torch.bfloat16
