"""Width options: smaller modules inside one block, and what each costs alone, untrained.

Modulation layers become low-rank where few directions of their inputs occur (the conditioning
of a diffusion transformer lies on a curve); feed-forward networks become affine maps (eq. 9).
Both start from closed forms, so their costs are known without training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ppcl.adapters import Adapter, StackSpec
from ppcl.artifacts import Analysis, StackAnalysis, WidthOption
from ppcl.config import FitConfig
from ppcl.cost import count_params
from ppcl.sensitivity import Job, output_errors
from ppcl.student import fill_width
from ppcl.trace import record_boundaries
from ppcl.width import apply_width, replacement

Parts = dict[str, dict[str, Any]]


def width_options(
    transformer: nn.Module,
    adapter: Adapter,
    analysis: Analysis,
    tensors: Mapping[str, Tensor],
    batches: Sequence[dict[str, Any]],
    settings: FitConfig,
) -> tuple[WidthOption, ...]:
    """Find and score all width options.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        analysis: Which ranks reach which tolerance.
        tensors: Closed forms, as the analyze stage wrote them.
        batches: Held-out states.
        settings: ``width`` names the groups, ``modulation_tolerances`` the ranks.
    """
    proposals = [
        (spec, index, group, parts)
        for spec in adapter.stacks
        for found in analysis.stacks
        if found.name == spec.name
        for index, block in enumerate(adapter.blocks(transformer, spec))
        for group, parts in _proposals(spec, found, index, block, settings)
    ]
    if not proposals:
        return ()
    tokens = _tokens(transformer, adapter, batches[0])
    jobs: dict[int, Job] = {}
    for number, (spec, index, _, parts) in enumerate(proposals):
        block = adapter.blocks(transformer, spec)[index]

        def make(spec: StackSpec = spec, index: int = index, parts: Parts = parts, block: nn.Module = block) -> Any:
            smaller = copy.deepcopy(block)
            apply_width(smaller, parts)
            fill_width(smaller, block, spec, index, parts, tensors)
            return smaller

        jobs[number] = ((spec.name, index, index), make)
    errors = output_errors(transformer, adapter, batches, jobs, "fit: width")
    options = []
    for number, (spec, index, group, parts) in enumerate(proposals):
        block = adapter.blocks(transformer, spec)[index]
        rows = tokens[spec.name, group.partition(".")[2]] if group.startswith("ffn") else 1
        params, flops = _savings(block, parts, rows)
        if params > 0:
            options.append(WidthOption(spec.name, index, group, parts, params, flops, errors[number]))
    return tuple(options)


def _proposals(
    spec: StackSpec, found: StackAnalysis, index: int, block: nn.Module, settings: FitConfig
) -> Iterator[tuple[str, Parts]]:
    """The replacements of one block that are worth measuring."""
    if "modulation" in settings.width and found.modulation_residual:
        seen = set()
        for tolerance in settings.modulation_tolerances:
            ranks = {
                spec.modulation[stream]: [rank for rank, missed in enumerate(blocks[index]) if missed <= tolerance]
                for stream, blocks in found.modulation_residual.items()
            }
            key = tuple(sorted((path, enough[0]) for path, enough in ranks.items() if enough))
            if key and key not in seen:
                seen.add(key)
                yield "modulation", {path: {"kind": "low_rank", "size": max(1, rank)} for path, rank in key}
    if "ffn" in settings.width:
        for stream, path in spec.ffn.items():
            measured = found.ffn_linearity.get(stream, ())
            if index < len(measured) and measured[index] is not None:
                yield f"ffn.{stream}", {path: {"kind": "linear", "size": 0}}


def _tokens(transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Tokens of each stream that enter the first block of each stack."""
    first = {(spec.name, 0) for spec in adapter.stacks if len(adapter.blocks(transformer, spec))}
    calls, _ = record_boundaries(transformer, adapter, arguments, first)
    return {
        (name, stream): state.shape[1] for (name, _), call in calls.items() for stream, state in call.inputs.items()
    }


def _savings(block: nn.Module, parts: Parts, rows: int) -> tuple[int, int]:
    """Parameters fewer, and forward FLOPs fewer for so many rows."""
    params = flops = 0
    for path, part in parts.items():
        module = block.get_submodule(path)
        smaller = replacement(module, part["kind"], part["size"])
        params += count_params(module) - count_params(smaller)
        flops += 2 * rows * (_multiplications(module) - _multiplications(smaller))
    return params, flops


def _multiplications(module: nn.Module) -> int:
    """Multiplications of all linear layers for one row."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
