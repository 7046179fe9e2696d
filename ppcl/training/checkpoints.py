"""What a training leaves on disk to go on from: folders ``step-N`` with one file of tensors, optimizers' states too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.parts import part_of
from ppcl.common.tensor_files import StoredTensors, read_metadata, write_tensors
from ppcl.training.eight_bit import joined_states, plain_states

FILE = "state.safetensors"


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, the newest last."""
    files = folder.glob(f"step-*/{FILE}")
    return sorted((int(path.parent.name.split("-")[1]), path.parent) for path in files)


def newest_checkpoint(folder: Path, fingerprint: str) -> tuple[Path, StoredTensors, dict[str, Any]] | None:
    """File, tensors and description of the newest checkpoint; None if there is none, or it is of another training.

    A tensor is read when it is asked for: each of several processes would have all of them in memory otherwise.
    """
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        return None
    path = checkpoints[-1][1] / FILE
    meta = read_metadata(path)
    return (path, StoredTensors(path), meta) if meta and meta.get("fingerprint") == fingerprint else None


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int
) -> None:
    """Write ``step-N`` and leave so many of the newest; those of later steps are of another training, and go."""
    write_tensors(folder / f"step-{step}" / FILE, tensors, meta)
    checkpoints = checkpoints_in(folder)
    kept = [place for number, place in checkpoints if number <= step][-keep:]
    for _, place in checkpoints:
        if place not in kept:
            shutil.rmtree(place, ignore_errors=True)


def optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizers' states by ``optimizer/<slot>/<name of the parameter>``."""
    return {
        f"optimizer/{slot}/{name}": value
        for name, parameter in parameters.items()
        for optimizer in optimizers
        for slot, value in plain_states(optimizer.state.get(parameter, {})).items()
    }


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what :func:`optimizer_tensors` took.

    Not by torch's ``set_optimizer_state_dict``: it refuses parameters that no gradient reached yet, and has optimizers
    without states take a step.
    """
    saved: dict[str, dict[str, str]] = {}
    for key in tensors:
        kind, *rest = key.split("/", 2)
        if kind == "optimizer":
            saved.setdefault(rest[1], {})[rest[0]] = key
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            # AdamW keeps its step counter as a float32 scalar on the parameter's device when fused
            if slots := saved.get(names[parameter], {}):
                parts = {slot: part_of(tensors[key], parameter) for slot, key in slots.items()}
                optimizer.state[parameter] = joined_states(parts)
