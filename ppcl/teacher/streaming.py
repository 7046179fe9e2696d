"""A pipeline whose transformer is read from its files while it runs, and when that is what a model needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ppcl.common.devices import weights_dtype
from ppcl.common.progress import announce
from ppcl.config.names import TRANSFORMER
from ppcl.teacher.blocks import StreamedBlocks, free_bytes, loaded_bytes
from ppcl.teacher.loading import fetch_files, open_pipeline, stored_dtype, stored_folder
from ppcl.teacher.pipeline_call import other_transformers
from ppcl.teacher.stored import transformers_in

RESIDENT, STREAMED = "resident", "streamed"


def choose_blocks(setting: str, models: Sequence[str], device: torch.device, precision: str = "auto") -> str:
    """Decide how the blocks of models that run side by side are kept, and say it.

    Args:
        setting: ``auto``, ``resident`` or ``streamed``.
        models: ``emoji``, pipeline folders, or hub ids, whose files are fetched unless they are to be resident.
        device: Where it runs.
        precision: See ``RunConfig.precision``.

    Returns:
        ``resident`` or ``streamed``; of ``auto`` resident where the transformers' weights fit the free memory.

    Raises:
        ModelError: The files of a hub model cannot be fetched.
    """
    for model in models if setting != RESIDENT else ():
        fetch_files(model)
    dtype = weights_dtype(device, precision)
    needed = sum(_transformers_bytes(model, dtype) for model in models)
    reason = "as blocks says"
    if setting == "auto":
        free = free_bytes(device)
        setting, reason = RESIDENT if needed < free else STREAMED, f"{free / 1e9:.1f} GB are free"
    whose = "transformer's" if len(models) == 1 else "transformers'"
    announce(f"blocks are {setting}: the {whose} weights take {needed / 1e9:.1f} GB; {reason}")
    return setting


def _transformers_bytes(model: str, dtype: torch.dtype) -> int:
    """Bytes of all transformers' weights, which are loaded together."""
    sizes, folder = loaded_bytes(model, dtype), stored_folder(model)
    return sum(sizes.get(name, 0) for name in (transformers_in(folder) if folder else ()))


def streamed_dtype(
    model: str,
    device: torch.device,
    precision: str = "auto",
    variant: str | None = None,
    component: str = TRANSFORMER,
) -> Any:
    """What streamed weights are read in: on a CPU as they are stored, unless ``fp32`` is asked for.

    Args:
        model: Whose files are here.
        device: Where it runs.
        precision: See ``RunConfig.precision``.
        variant: In the weights' file names.
        component: Which transformer.

    Returns:
        A dtype; None for weights that are stored in none that can be read.
    """
    if device.type == "cpu" and precision != "fp32":
        return stored_dtype(model, variant, component)
    return weights_dtype(device, precision)


def load_streamed(
    model: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    beside: Any | None = None,
    component: str = TRANSFORMER,
) -> Any:
    """Load a pipeline that never holds more than two of its transformer's blocks.

    It is called as any pipeline is. Its text encoders, and a second transformer, come to a GPU layer by layer while
    they run (diffusers' group offloading): the former are as large as a transformer's half.

    Args:
        model: ``emoji``, a pipeline folder, or a hub id whose files are in the cache.
        device: Where it runs.
        dtype: Of all weights; as most of the transformer's are stored if None, on a CPU too.
        variant: In the weights' file names.
        beside: A pipeline on the device whose components are this one's, too, all but the transformer.
        component: Which transformer.

    Returns:
        The pipeline, frozen, without a progress bar; ``streamed_blocks`` is the source of its transformer's blocks, and
        that one's ``detach`` ends the reading.

    Raises:
        ModelError: It cannot be loaded, its transformer is not supported, or its files are not here.
    """
    source = StreamedBlocks(model, device, dtype, variant, component)
    if beside is None:
        pipeline = open_pipeline(model, device, source.dtype, variant, {component: source.transformer})
    else:
        pipeline = copy.copy(beside)
        setattr(pipeline, component, source.transformer)
    others = other_transformers(pipeline, component)
    for name, part in pipeline.components.items():
        if beside is None and isinstance(part, nn.Module) and part is not source.transformer:
            _place(part, device, name.startswith("text_encoder") or name in others)
    source.attach()
    pipeline.streamed_blocks = source
    return pipeline


def _place(component: nn.Module, device: torch.device, large: bool) -> None:
    if large and device.type == "cuda":
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(component, device, torch.device("cpu"), offload_type="leaf_level")
    else:
        component.to(device)
