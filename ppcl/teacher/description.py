"""Describing a loaded teacher for the planner."""

from __future__ import annotations

from typing import Any

from torch import nn

from ppcl.common.files import digest
from ppcl.config.names import TRANSFORMER
from ppcl.teacher.block_map import first_params, recorded_maps
from ppcl.teacher.blocks import main_dtype
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.model_info import ModelInfo, Stack


def config_digest(transformer: Any) -> str:
    """Identify a transformer by its class and config (weights excluded, private keys too)."""
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    return digest(type(transformer).__name__, config)


def describe(pipeline: Any, flops: dict[str, Any] | None = None, component: str = TRANSFORMER) -> ModelInfo:
    """Describe a pipeline's transformer for the planner.

    Args:
        pipeline: The teacher.
        flops: What :func:`ppcl.teacher.flops.count_flops` measured: ``total`` and per-stack lists.
        component: Which transformer.

    Raises:
        ModelError: It was compressed before, and its record of that is not of its blocks.
    """
    transformer = getattr(pipeline, component)
    adapter = adapter_for(transformer)
    maps = recorded_maps(transformer.config, {s.name: len(adapter.all_blocks(transformer, s)) for s in adapter.stacks})
    stacks = []
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        counted = tuple(flops["stacks"][spec.name]) if flops else ()
        sizes = tuple(map(count_params, blocks))
        spans = maps[spec.name].spans[: len(blocks)] if spec.name in maps else ()
        stacks.append(Stack(spec.name, spec.count_field, len(blocks), sizes, counted, spans))
    others = [c for n, c in pipeline.components.items() if n != component and isinstance(c, nn.Module)]
    return ModelInfo(
        transformer_class=type(transformer).__name__,
        config_digest=config_digest(transformer),
        params=count_params(transformer),
        flops=int(flops["total"]) if flops else 0,
        # the largest weight's: some classes keep small ones in float32 whatever the rest is loaded in
        bytes_per_param=main_dtype(transformer).itemsize,
        other_bytes=sum(p.numel() * p.element_size() for c in others for p in c.parameters()),
        stacks=tuple(stacks),
        first_params=first_params(transformer.config),
        component=component,
    )
