"""Which modules can lose units, which units go, and what their closed forms are.

A module is offered only where cutting a unit out of it gives what the block gives with the
unit's columns set to zero, on a recorded call: that holds for ordinary feed-forward networks and
attentions and is not taken from their names.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.layer_inputs import Signal, moments_of
from ppcl.analysis.moments import Moments
from ppcl.common.progress import announce
from ppcl.config import FitConfig
from ppcl.modules.replacements import set_module
from ppcl.modules.slicing import Units, corrected, heads_of, masked, neurons_of, sliced
from ppcl.modules.text_stream import plain_norm, text_replacement
from ppcl.pruning.criteria import Site, unit_cost, unit_scores
from ppcl.pruning.criteria.draws import best_draw, cut_error
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.trace import BlockCall

logger = logging.getLogger(__name__)
Calls = Mapping[tuple[str, int], BlockCall]
Tensors = dict[str, Tensor]
TEXT_RIDGE = 1e-4


def find_sites(
    transformer: nn.Module, adapter: Adapter, calls: Calls, groups: Sequence[str]
) -> list[tuple[str, Site, str]]:
    """Find the modules whose units may go.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        calls: A recorded call of the first block of each stack.
        groups: ``ffn`` and ``attention`` are looked for.

    Returns:
        Group of the option (``ffn.image``, ``attention``), the module, and the stream that a feed-forward network
        belongs to.
    """
    found: list[tuple[str, Site, str]] = []
    for spec in adapter.stacks:
        refused: dict[str, bool] = {}  # by group: tested on the first block that has it
        for index, block in enumerate(adapter.blocks(transformer, spec)):
            for group, path, units, stream in _units_of(spec, block, groups):
                if group not in refused:
                    refused[group] = not cuts_cleanly(adapter, spec, block, path, units, calls[spec.name, 0])
                    if refused[group]:
                        logger.warning("%s.%s: %s cannot be cut here; not offered", spec.name, path, units.kind)
                if not refused[group]:
                    found.append((group, Site(spec.name, index, path, units), stream))
    return found


def _units_of(spec: StackSpec, block: nn.Module, groups: Sequence[str]) -> Iterator[tuple[str, str, Units, str]]:
    """Group, path, units and stream of the modules of one block."""
    if "ffn" in groups:
        for stream, path in spec.ffn.items():
            units = neurons_of(block.get_submodule(path))
            if units is not None:
                yield f"ffn.{stream}", path, units, stream
    if "attention" in groups:
        named = {name: heads_of(child) for name, child in block.named_children()}
        several = sum(units is not None for units in named.values()) > 1
        for name, units in named.items():
            if units is not None:
                yield f"attention.{name}" if several else "attention", name, units, ""


@torch.no_grad()
def cuts_cleanly(adapter: Adapter, spec: StackSpec, block: nn.Module, path: str, units: Units, call: BlockCall) -> bool:
    """Whether a block without half of the units gives what it gives with their columns zeroed."""
    part = units.part(range(0, units.count, 2))
    outputs = [adapter.call(spec, block, call.inputs, call.arguments)]
    for make in (masked, sliced):
        changed = copy.deepcopy(block)
        set_module(changed, path, make(block.get_submodule(path), part))
        try:
            outputs.append(adapter.call(spec, changed, call.inputs, call.arguments))
        except (RuntimeError, ValueError, IndexError):  # a shape that the block's code takes for granted
            return False
    for whole, zeroed, cut in zip(*(states.values() for states in outputs), strict=True):
        if zeroed is not None:
            rounding = 4 * torch.finfo(zeroed.dtype).eps * float(zeroed.float().norm())
            if float((cut - zeroed).float().norm()) > 0.05 * float((zeroed - whole).float().norm()) + rounding:
                return False
    return True


def sizes_of(units: Units, shares: Sequence[float]) -> list[int]:
    """How many units the options keep: shares of them, neurons in multiples of 64 (fewer where they are few)."""
    step = 1
    while units.kind == "narrow" and step < 64 and step * 16 <= units.count:
        step *= 2
    sizes = {max(step, round(share * units.count / step) * step) for share in shares}
    return sorted(size for size in sizes if size < units.count)


def criterion_cost(
    settings: FitConfig, sets: Sequence[Sequence[dict[str, Any]]], held_out: Sequence[dict[str, Any]]
) -> float | None:
    """What choosing units costs, in runs of the teacher on one state; it is said before anything starts.

    Args:
        settings: ``criterion``.
        sets: Calibration sets; of several each is tried on the held-out states.
        held_out: Those states.

    Returns:
        The number; None where a criterion from outside does not say.
    """
    states = [sum(map(batch_size, batches)) for batches in sets]
    cost = unit_cost(settings.criterion, sum(states))
    if cost is not None and len(sets) > 1:
        cost += 2 * len(sets) * sum(map(batch_size, held_out))
    says = "it does not say what it costs" if cost is None else f"{cost:,.0f} runs of the teacher on one state"
    announce(f"criterion {settings.criterion}, {len(sets)} draw(s) of {states[0]} states: {says}")
    return cost


def cut_options(
    transformer: nn.Module,
    adapter: Adapter,
    sites: Sequence[tuple[str, Site, str]],
    batches: Sequence[dict[str, Any]],
    settings: FitConfig,
    seed: int,
    other_draws: Sequence[Sequence[dict[str, Any]]] = (),
    held_out: Sequence[dict[str, Any]] = (),
) -> tuple[list[list[dict[str, Any]]], Tensors]:
    """Choose the units that stay, by the criterion, and correct the columns that read them.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: See :func:`find_sites`.
        batches: Training states.
        settings: ``criterion`` and ``width_shares``.
        seed: For the criterion.
        other_draws: Further sets of training states that the criterion may use instead
            (:mod:`ppcl.pruning.criteria.draws`).
        held_out: States that say which of the sets is best.

    Returns:
        The replacements of each site, one a size; and ``stack/block/path/kind-size/layer.weight|bias``.
    """
    own, shares = [site for _, site, _ in sites], sorted(settings.width_shares)
    scores = best_draw(
        lambda states: unit_scores(settings.criterion, transformer, adapter, own, states, seed),
        lambda found: cut_error(transformer, adapter, own, found, shares[len(shares) // 2], held_out),
        [batches, *other_draws],
    )
    parts: list[list[dict[str, Any]]] = []
    for (_, site, _), score in zip(sites, scores, strict=True):
        order = torch.argsort(score, descending=True, stable=True).tolist()  # of equals the first stays
        parts.append([site.units.part(sorted(order[:size])) for size in sizes_of(site.units, settings.width_shares)])
    owner: dict[Signal, tuple[int, str]] = {}
    for number, (_, site, stream) in enumerate(sites):
        for name, layer in site.layers(transformer, adapter).items():
            of = stream or ("text" if "add" in name else "image")
            owner[Signal(site.stack, site.block, f"{site.path}.{name}", layer.in_features, of)] = (number, name)
    tensors: Tensors = {}
    for signal, moments in moments_of(transformer, adapter, list(owner), batches):
        number, name = owner[signal]
        site = sites[number][1]
        layer = site.layers(transformer, adapter)[name]
        for part in parts[number]:
            made = corrected(layer.weight, layer.bias, part, _moment(moments), settings.width_ridge)
            prefix = f"{site.stack}/{site.block}/{site.path}/{part['kind']}-{part['size']}/{name}"
            for kind, value in zip(("weight", "bias"), made, strict=True):
                if value is not None:
                    tensors[f"{prefix}.{kind}"] = value.to(layer.weight.dtype).cpu()
    return parts, tensors


def _moment(moments: Moments) -> tuple[Tensor, Tensor]:
    mean = moments.sum_x / moments.count
    return mean, moments.xx / moments.count - torch.outer(mean, mean)


def text_options(
    transformer: nn.Module,
    adapter: Adapter,
    probes: Mapping[str, Tensor],
    batches: Sequence[dict[str, Any]],
) -> tuple[dict[tuple[str, int], dict[str, dict[str, Any]]], Tensors]:
    """Find the blocks whose text stream can become two linear maps, and fit l_z (l_h is the text's probe).

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        probes: What the analyze stage wrote.
        batches: Training states.

    Returns:
        The replacements by stack and block; and ``stack/block/text_input/weight|bias``, x W + b with x = Norm(h).
    """
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    signals: list[Signal] = []
    for spec in adapter.stacks:
        for index, block in enumerate(adapter.blocks(transformer, spec) if spec.text_parts else ()):
            norm = _text_norm(spec, block)
            if norm is None or not spec.text_qkv or f"{spec.name}/{index}/text/weight" not in probes:
                continue
            found[spec.name, index] = {path: {"kind": kind, "size": 0} for path, kind in spec.text_parts.items()}
            features = int(norm.normalized_shape[-1])
            signals.append(Signal(spec.name, index, spec.text_qkv, features, "text", norm))
    tensors: Tensors = {}
    for signal, moments in moments_of(transformer, adapter, signals, batches):
        weight, bias = moments.ridge(TEXT_RIDGE)
        tensors[f"{signal.stack}/{signal.block}/text_input/weight"] = weight.float().cpu()
        tensors[f"{signal.stack}/{signal.block}/text_input/bias"] = bias.float().cpu()
    return found, tensors


def _text_norm(spec: StackSpec, block: nn.Module) -> nn.LayerNorm | None:
    """The LayerNorm before the text's projections, if all parts of the text stream can be replaced."""
    norm = None
    for path, kind in spec.text_parts.items():
        try:
            module = block.get_submodule(path)
        except AttributeError:
            return None
        if text_replacement(module, kind) is None:
            return None
        if kind == "text_input":
            norm = plain_norm(module)
    return norm
