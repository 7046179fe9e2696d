"""The smallest student that settings allow, from a config alone: what asks for less is refused before anything is done.

A bound, not a plan: of a stack's unprotected blocks one run may leave a single block (the paper's intervals have no
longest length, so ``fit.max_run`` is no bound), smaller modules are as small as options make them, and time that
smaller modules save is only known once it is measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ppcl.config import FitConfig, PlanConfig, RunConfig
from ppcl.config.names import Width
from ppcl.errors import BudgetError
from ppcl.modules.replacements import apply_width, replacement
from ppcl.modules.slicing import Units, is_matrix, matrix_of, neurons_of
from ppcl.pruning.fewer_units import sizes_of
from ppcl.pruning.knapsack import overlap
from ppcl.pruning.planner import UNITS
from ppcl.student.plan import free_blocks
from ppcl.teacher.families import Adapter, StackSpec, adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.model_info import ModelInfo, Stack

DEPTH_ONLY = ("paper", "uniform", "influence", "random", "position")  # searches that use no smaller modules
ALL: tuple[Width, ...] = ("modulation", "ffn", "attention", "text")
Part = dict[str, Any]
LEAST_BYTES = {"int8": 1.0, "fp8": 1.0, "nvfp4": 0.5, "int4": 0.5, "nf4": 0.5}  # of a weight, its scales left out


@dataclass(frozen=True)
class Limits:
    """What no plan can beat.

    Attributes:
        params: Parameters of the transformer that stay in any case.
        param_ratio: Share of the teacher's.
        speedup: The most, by FLOPs; None where it is not known before times are measured.
        bytes: Of all weights that are known of.
    """

    params: int
    param_ratio: float
    speedup: float | None
    bytes: float


def limits_of(
    transformer: Any, info: ModelInfo, config: RunConfig, itemsize: int = 2, other_bytes: float = 0.0
) -> Limits:
    """Bound what plans can reach.

    Args:
        transformer: On any device, the meta device included.
        info: Its description.
        config: Protected blocks, search, and the groups and sizes of smaller modules.
        itemsize: Bytes of a weight.
        other_bytes: Of the other components, as far as they are known.
    """
    adapter, settings = adapter_for(transformer), config.plan
    groups = groups_of(config)
    thin = _Thin(adapter, transformer, config.fit, groups)
    of_blocks = sum(sum(stack.block_params) for stack in info.stacks)
    params = info.params - of_blocks
    for spec, stack in zip(adapter.stacks, info.stacks, strict=True):
        params += _least(info, stack, settings, partial(thin.block, spec), partial(thin.substitute, spec))
    speedup = None
    if info.flops and not groups:
        flops = info.flops - sum(sum(stack.block_flops) for stack in info.stacks)
        for stack in info.stacks:
            same: Callable[[int], int] = stack.block_flops.__getitem__
            flops += _least(info, stack, settings, same, same)
        speedup = info.flops / flops
    stored = params * itemsize
    if config.planned_format != "none":  # blocks may be all linear layers of the format's fewest bits
        outside = info.params - of_blocks
        stored = 2 * outside + math.floor(LEAST_BYTES[config.planned_format] * (params - outside))
    return Limits(params, params / info.params, speedup, stored + other_bytes)


def groups_of(config: RunConfig) -> tuple[Width, ...]:
    """The groups of smaller modules that a plan may use."""
    if config.plan.mode in DEPTH_ONLY:
        return ()
    allowed = config.plan.width
    return tuple(group for group in config.fit.width if allowed is None or group in allowed)


def _least(
    info: ModelInfo, stack: Stack, settings: PlanConfig, block: Callable[[int], int], substitute: Callable[[int], int]
) -> int:
    """What stays of a stack at least: its protected blocks, and one block in the place of the others."""
    low, high = free_blocks(info, stack, settings)
    low, high = min(low, stack.num_blocks), max(high, 0)
    kept = [i for i in range(stack.num_blocks) if not low <= i < high]
    free = range(low, high)
    total = sum(map(block, kept))
    if len(free) == 0:
        return total
    single = sum(map(block, free))
    return total + (min(single, *map(substitute, free)) if len(free) > 1 and settings.mode != "allocation" else single)


class _Thin:
    """Parameters of blocks with the smallest modules that there may be; of blocks of one shape one is looked at."""

    def __init__(self, adapter: Adapter, transformer: Any, settings: FitConfig, groups: Sequence[Width]) -> None:
        self.adapter, self.transformer, self.settings, self.groups = adapter, transformer, settings, groups
        self.known: dict[Any, tuple[int, int]] = {}

    def block(self, spec: StackSpec, index: int) -> int:
        """Of a block in its own place."""
        return self._both(spec, index)[0]

    def substitute(self, spec: StackSpec, index: int) -> int:
        """Of one in the place of a run, of which modulation alone may be smaller."""
        return self._both(spec, index)[1]

    def _both(self, spec: StackSpec, index: int) -> tuple[int, int]:
        block = self.adapter.blocks(self.transformer, spec)[index]
        shapes = (spec.name, tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
        if shapes not in self.known:
            ranks, rest = self._modulation(spec, block), self._networks(spec, block)
            others = self._others(spec, block, [*ranks, *rest])
            counts = [_count(block, {**rest, **ranks}) - others, count_params(block)]
            if "text" in self.groups and (text := self._text(spec, block)):
                apart = {p: part for p, part in {**rest, **ranks}.items() if not overlap({p: part}, text)}
                counts.append(_count(block, {**text, **apart}) - others)
            self.known[shapes] = min(counts), min(count_params(block), _count(block, ranks))
        return self.known[shapes]

    def _modulation(self, spec: StackSpec, block: nn.Module) -> dict[str, Part]:
        paths = spec.of(block).modulation.values() if "modulation" in self.groups else ()
        return {path: {"kind": "low_rank", "size": 1} for path in paths}

    def _networks(self, spec: StackSpec, block: nn.Module) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for path in spec.of(block).ffn.values() if "ffn" in self.groups else ():
            module = block.get_submodule(path)
            units = neurons_of(module)
            sizes = sizes_of(units, self.settings.width_shares, self.settings.width_multiple) if units else []
            choices: list[Part] = [units.part(range(sizes[0]))] if units and sizes else []
            if any(isinstance(layer, nn.Linear) for layer in module.modules()):
                choices.append({"kind": "linear", "size": 0})
            if choices:
                parts[path] = min(choices, key=lambda part: count_params(replacement(module, part)))
        return parts

    def _others(self, spec: StackSpec, block: nn.Module, replaced: Collection[str]) -> int:
        """What layers may lose whose units are only found by a call: all of them are taken to have some."""
        of_ffn, of_attention = "ffn" in self.groups and not spec.ffn, "attention" in self.groups
        if not of_ffn and not of_attention:
            return 0
        saved = 0.0
        for name, layer in block.named_modules():
            known = any(f"{name}.".startswith(f"{path}.") for path in (*replaced, *spec.modulation.values()))
            if is_matrix(layer) and not known:
                saved += (1 - self._least_share(block, name)) * matrix_of(layer).numel()
        return math.floor(saved)

    def _least_share(self, block: nn.Module, name: str) -> float:
        """The smallest share of a layer's units that options keep: heads are rounded, and so are neurons."""
        wanted, size = min(self.settings.width_shares, default=1.0), max(matrix_of(block.get_submodule(name)).shape)
        parent = block.get_submodule(name.rpartition(".")[0])
        heads = [n for key, n in vars(parent).items() if key.endswith("heads") and type(n) is int and n > 1]
        sizes = sizes_of(Units("narrow", size, (), ()), self.settings.width_shares, self.settings.width_multiple)
        neurons = [sizes[0] / size] if sizes else []
        return min(wanted, *(max(1, round(wanted * n)) / n for n in heads), *neurons, 1.0)

    def _text(self, spec: StackSpec, block: nn.Module) -> dict[str, Part]:
        parts = spec.of(block).text_parts
        if not all(_has(block, path) for path in parts):
            return {}
        return {path: {"kind": kind, "size": 0} for path, kind in parts.items()}


def _count(block: nn.Module, parts: dict[str, Part]) -> int:
    smaller = copy.deepcopy(block)
    apply_width(smaller, parts)
    return count_params(smaller)


def _has(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def check_limits(limits: Limits, config: RunConfig) -> None:
    """Refuse a budget that is surely out of reach.

    Raises:
        BudgetError: It is; the message names what is possible at most, and the settings that say so.
    """
    kind, value = config.plan.budget
    if kind == "keep" and limits.param_ratio > value + 1e-9:
        least = f"--keep {math.ceil(limits.param_ratio * 1000) / 1000:g}"
    elif kind == "speedup" and limits.speedup is not None and limits.speedup < value - 1e-9:
        least = f"--speedup {math.floor(limits.speedup * 100) / 100:g}"
    elif kind == "fit_gb" and limits.bytes > value * 1e9:
        least = f"--fit {math.ceil(limits.bytes / 1e6) / 1e3:g}GB"
    else:
        return
    raise BudgetError(
        f"no plan gives {value:g} {UNITS[kind]}: {least} is as far as these settings could reach "
        f"({remedies(config)}); stay within that, or change them"
    )


def remedies(config: RunConfig) -> str:
    """The settings that hold a plan back, and what they are."""
    plan, fit = config.plan, config.fit
    held = []
    if plan.mode in DEPTH_ONLY or plan.mode == "allocation":
        held.append(f"plan.mode={plan.mode}")
    if plan.protect_first or plan.protect_last:
        held.append(f"plan.protect_first={plan.protect_first}, plan.protect_last={plan.protect_last}")
    if missing := [group for group in ALL if group not in groups_of(config)]:
        held.append(f"fit.width and plan.width without {', '.join(missing)}")
    if groups_of(config) and {"ffn", "attention"} & set(groups_of(config)):
        held.append(f"fit.width_shares={list(fit.width_shares)}")
    if fit.width_multiple > 64 and "ffn" in groups_of(config):
        held.append(f"fit.width_multiple={fit.width_multiple}")
    return "; ".join(held)
