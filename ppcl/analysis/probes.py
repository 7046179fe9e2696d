"""Chained linear probes: a run of blocks as one affine map a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppcl.student.assembly import RunKey


def chained_probe(
    probes: Mapping[str, Tensor], run: RunKey, streams: Sequence[str], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compose the residual probes of a run into one affine map a stream: h -> h A + c."""
    maps = {}
    for stream in streams:
        total: Tensor | None = None
        offset: Tensor | None = None
        for index in range(run[1], run[2] + 1):
            key = f"{run[0]}/{index}/{stream}"
            if f"{key}/weight" not in probes:
                break
            weight = probes[f"{key}/weight"].to(device).double()
            bias = probes[f"{key}/bias"].to(device).double()
            step = torch.eye(len(weight), dtype=torch.float64, device=device) + weight
            total = step if total is None else total @ step
            offset = bias if offset is None else offset @ step + bias
        if total is None or offset is None:
            width = probes[f"{run[0]}/{run[1]}/{streams[0]}/weight"].shape[1]
            total, offset = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        maps[stream] = (total.float().to(device), offset.float().to(device))
    return maps
