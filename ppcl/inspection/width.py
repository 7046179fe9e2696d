"""What smaller modules could give, seen from configs alone: an example of a plan, counted exactly on the meta device.

Which rank a modulation layer needs and what a cut costs is measured by the fit stage on real states. Here the rank is
assumed, and modules shrink in the order that was cheapest on the embedded teacher (docs/width.md): modulation, the
text stream's networks, the image stream's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ppcl.inspection.blueprint import flops_on_meta
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import apply_width, replacement
from ppcl.modules.slicing import neurons_of
from ppcl.pruning.fewer_units import sizes_of
from ppcl.teacher.families import Adapter
from ppcl.teacher.flops import count_params

RANK = 64
SHARES = (0.75, 0.5, 0.25)
Part = dict[str, Any]


@dataclass(frozen=True)
class Wider:
    """A plan with smaller modules in every block and no block removed.

    Attributes:
        rank: Of the modulation layers, assumed; None if the family has none that can shrink.
        networks: What becomes of the feed-forward networks of a stream, e.g. ``{"text": "one affine map"}``.
        params: Parameters of the transformer, exactly.
        param_ratio: Share of the teacher's.
        flops: Forward FLOPs of one call; None where they were not counted.
        speedup: Teacher FLOPs / these; None likewise.
        bytes_bf16: Bytes of the transformer's weights in bfloat16.
    """

    rank: int | None
    networks: dict[str, str]
    params: int
    param_ratio: float
    flops: int | None
    speedup: float | None
    bytes_bf16: int


def widest_within(
    transformer: Any, adapter: Adapter, keep: float, rank: int = RANK, arguments: Mapping[str, Any] | None = None
) -> Wider | None:
    """The largest such plan within a share of the parameters; None if smaller modules alone do not reach it.

    Args:
        transformer: On the meta device.
        adapter: Its family.
        keep: Share of the parameters.
        rank: Of every modulation layer.
        arguments: An example call, to count FLOPs.
    """
    total = count_params(transformer)
    for modulated, networks, parts in plans(transformer, adapter, rank):
        if total - _saved(transformer, parts) <= keep * total:
            smaller = build(transformer, parts)
            params = count_params(smaller)
            flops, before = (
                (int(flops_on_meta(model, dict(arguments))["total"]) for model in (smaller, transformer))
                if arguments
                else (None, None)
            )
            speedup = before / flops if flops and before else None
            return Wider(rank if modulated else None, networks, params, params / total, flops, speedup, 2 * params)
    return None


def build(transformer: Any, parts: Mapping[str, Part]) -> Any:
    """A copy of a transformer, of the compressed class, with smaller modules.

    Args:
        transformer: On the meta device, or copying it takes its memory once more.
        parts: Path in the transformer -> its replacement.
    """
    smaller = copy.deepcopy(transformer)
    apply_width(smaller, parts)
    compress_class(smaller, parts)
    return smaller


def plans(transformer: Any, adapter: Adapter, rank: int) -> Iterator[tuple[bool, dict[str, str], dict[str, Part]]]:
    """Plans from larger to smaller."""
    parts: dict[str, Part] = {}
    for spec in adapter.stacks:
        for index, block in enumerate(adapter.blocks(transformer, spec)):
            for path in spec.of(block).modulation.values():
                low = {path: {"kind": "low_rank", "size": rank}}
                if _saved(block, low) > 0:
                    parts[f"{spec.name}.{index}.{path}"] = low[path]
    modulated = bool(parts)
    networks: dict[str, str] = {}
    if modulated:
        yield modulated, {}, dict(parts)
    streams = [stream for spec in adapter.stacks for stream in spec.ffn]
    for stream in sorted(set(streams), key=lambda name: name != "text"):
        for share in (*SHARES, None):
            networks_of_stream = {
                f"{spec.name}.{index}.{spec.ffn[stream]}": part
                for spec in adapter.stacks
                for index, block in enumerate(adapter.blocks(transformer, spec))
                if stream in spec.of(block).ffn and (part := _network(block.get_submodule(spec.ffn[stream]), share))
            }
            if networks_of_stream:
                parts |= networks_of_stream
                networks = {**networks, stream: "one affine map" if share is None else f"{share:.0%} of the neurons"}
                yield modulated, networks, dict(parts)


def _network(module: nn.Module, share: float | None) -> Part | None:
    if share is None:
        return {"kind": "linear", "size": 0}
    units = neurons_of(module)
    sizes = sizes_of(units, (share,)) if units else []
    return units.part(range(sizes[0])) if units and sizes else None


def _saved(transformer: nn.Module, parts: Mapping[str, Part]) -> int:
    """Parameters fewer; modules of one shape are counted once."""
    saved_by_shape: dict[Any, int] = {}
    total = 0
    for path, part in parts.items():
        module = transformer.get_submodule(path)
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        key = (shapes, part["kind"], part["size"])
        if key not in saved_by_shape:
            saved_by_shape[key] = count_params(module) - count_params(replacement(module, part))
        total += saved_by_shape[key]
    return total
