"""How many bytes a transformer's weights take in a quantised format: by shapes alone, before anything is quantised.

Quantised are the linear layers of blocks whose shape the format takes. Norms, biases, embeddings, what stands outside
of the blocks, and the factors of low-rank layers, which are small already, stay in bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ppcl.config.names import Quantize
from ppcl.modules.replacements import LowRankLinear
from ppcl.student.assembly import smaller_on_meta
from ppcl.student.plan import Segment, start_index
from ppcl.teacher.families import Adapter

GROUPS = (128, 64, 32)  # weights with one scale, of int4: the largest that divides a layer's inputs
REST = torch.bfloat16  # what the rest is stored in, and what is calculated in


def _int8_scale() -> int:
    """Bytes of a row's scale: float32, and of torchao 0.17 in the weights' own bfloat16."""
    try:
        return 2 if Version(metadata.version("torchao")) < Version("0.18") else 4
    except metadata.PackageNotFoundError:
        return 4


_INT8_SCALE = _int8_scale()


def group_of(columns: int) -> int | None:
    """Weights that share a scale in int4, of a layer of so many inputs; None: no group divides them."""
    return next((group for group in GROUPS if columns % group == 0), None)


def layer_bytes(kind: Quantize, rows: int, columns: int) -> int | None:
    """Bytes of a linear layer's weight (rows, columns) in a format, scales included; None: it stays in ``REST``."""
    count = rows * columns
    if kind == "int8":
        return count + (_INT8_SCALE + 1) * rows  # a scale and a zero point (int8) a row
    if kind == "fp8":
        return count + 4 * rows
    if kind == "nvfp4":
        if rows % 16 or columns % 16:
            return None
        tiles = math.ceil(rows / 128) * math.ceil(columns / 64)  # a scale (float8) for 16 weights, in tiles of 128 x 4
        return count // 2 + 512 * tiles + 4
    if kind == "int4":
        group = group_of(columns)
        return None if group is None else count // 2 + 4 * (count // group)  # scale and zero point in bfloat16
    blocks = math.ceil(count / 64)  # nf4: a scale of 8 bits for 64 weights, one of 32 bits for 256 of these
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (256 + 16) + 170


def quantised_layers(block: nn.Module, kind: Quantize) -> dict[str, nn.Linear]:
    """The linear layers of a block that a format takes, by path."""
    kept = {id(part) for m in block.modules() if isinstance(m, LowRankLinear) for part in m.modules()}
    linear = {
        path: layer
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in kept
        # bitsandbytes puts in a class of its own, whose forward is a plain layer's
        if kind != "nf4" or type(layer).forward is nn.Linear.forward
    }
    return {p: m for p, m in linear.items() if layer_bytes(kind, m.out_features, m.in_features) is not None}


def layers_of(transformer: Any, adapter: Adapter, kind: Quantize) -> dict[str, nn.Linear]:
    """The layers of a whole transformer that a format takes, by path.

    Of nf4 those outside of the blocks, too, that are named as one inside (``proj_out`` of FLUX): diffusers leaves out
    both or none of them.
    """
    layers = {
        f"{spec.name}.{position}.{path}": layer
        for spec in adapter.stacks
        for position, block in enumerate(adapter.blocks(transformer, spec))
        for path, layer in quantised_layers(block, kind).items()
    }
    names = {path.rpartition(".")[2] for path in layers} if kind == "nf4" else set()
    return layers | {n: m for n, m in transformer.named_children() if n in names and isinstance(m, nn.Linear)}


def saved_bytes(layers: Iterable[nn.Linear], kind: Quantize) -> int:
    """Bytes that layers take less in a format than in ``REST``."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    return sum(2 * rows * columns - (layer_bytes(kind, rows, columns) or 0) for rows, columns in shapes)


class StoredSize:
    """Bytes of a teacher's transformer as plans make it, in a format.

    Args:
        transformer: The teacher's; its weights are not looked at.
        adapter: Its family.
        kind: The format.
    """

    def __init__(self, transformer: Any, adapter: Adapter, kind: Quantize) -> None:
        self.kind, self.adapter = kind, adapter
        self._float32 = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
        self._blocks = {spec.name: list(adapter.blocks(transformer, spec)) for spec in adapter.stacks}
        self._known: dict[Any, int] = {}
        inside = sum(self._plain(block) for blocks in self._blocks.values() for block in blocks)
        outside = [m for path, m in layers_of(transformer, adapter, kind).items() if "." not in path]
        self.outside = self._plain(transformer) - inside - saved_bytes(outside, kind)

    def _plain(self, module: nn.Module) -> int:
        """Bytes of a module that stays as it is."""
        return sum(
            tensor.numel() * (4 if self._float32 & set(name.split(".")) else 2)
            for name, tensor in module.state_dict().items()
        )

    def of(self, stacks: Mapping[str, Sequence[Segment]]) -> int:
        """Bytes of the transformer that a plan's segments make."""
        return self.outside + sum(self._segment(name, segment) for name, pieces in stacks.items() for segment in pieces)

    def of_teacher(self) -> int:
        """Bytes of the teacher itself."""
        return self.of({name: [Segment(i, i) for i in range(len(blocks))] for name, blocks in self._blocks.items()})

    def _segment(self, stack: str, segment: Segment) -> int:
        block = self._blocks[stack][start_index(segment.first, segment.last, segment.start)]
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
        key = (shapes, json.dumps(segment.width, sort_keys=True))
        if key not in self._known:
            smaller = smaller_on_meta(block, segment.width)
            layers = quantised_layers(smaller, self.kind).values()
            self._known[key] = self._plain(smaller) - saved_bytes(layers, self.kind)
        return self._known[key]
