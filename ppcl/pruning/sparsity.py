"""Zeros in the linear layers of a student's blocks: where they go, and that they stay.

A mask is true where a weight stays. It is made once, before distillation, from a criterion (which weights of a row) and
an allocation (how many in which block); training multiplies gradients and weights by it. A block with masks is a
substitute like any other: trained on the teacher's states, written into the bundle, and taken out again as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ppcl.common.streams import Stream, step_generator
from ppcl.config.sparsity import SparsityConfig
from ppcl.errors import ModelError
from ppcl.modules.replacements import LowRankLinear
from ppcl.modules.text_stream import TextInput
from ppcl.pruning.allocations import COUNTS
from ppcl.pruning.criteria.base import signed_output
from ppcl.pruning.criteria.weight_masks import n_of_m_mask, row_mask
from ppcl.pruning.criteria.weights import Layer, weight_cost, weight_criterion_named, weight_scores
from ppcl.pruning.criteria.zeroth_order import gradient_norm
from ppcl.student.assembly import run_name
from ppcl.student.masks import Blocks, Tensors
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import Adapter

logger = logging.getLogger(__name__)


def sparse_plan(plan: CompressionPlan, settings: SparsityConfig) -> CompressionPlan:
    """The plan with zeros in every block; as it is where sparsity is off."""
    if not settings.zeros:
        return plan
    stacks = {
        name: tuple(replace(segment, sparsity=settings.zeros) for segment in segments)
        for name, segments in plan.stacks.items()
    }
    names = ("pattern", "criterion", "allocation")
    return replace(plan, stacks=stacks, sparsity={name: getattr(settings, name) for name in names})


def sparse_layers(plan: CompressionPlan, adapter: Adapter, blocks: Blocks, settings: SparsityConfig) -> list[Layer]:
    """The linear layers that get zeros, named ``stack/first-last/path.weight``.

    Those that were made smaller as a whole (low rank, one affine map) are left out.

    Args:
        plan: Names the smaller modules.
        adapter: Names the modulation layers.
        blocks: All of the student's blocks.
        settings: Whether modulation layers count; which pattern has to fit.

    Raises:
        ModelError: There are none, or none that the pattern fits.
    """
    layers: list[Layer] = []
    refused: list[Layer] = []
    for spec in adapter.stacks:
        for segment in plan.stacks[spec.name]:
            key = (spec.name, segment.first, segment.last)
            inside = list(blocks[key].named_modules())
            closed = [path for path, module in inside if isinstance(module, LowRankLinear | TextInput)]
            closed += [] if settings.modulation else list(spec.modulation.values())
            for path, module in inside:
                if type(module) is not nn.Linear or any(f"{path}.".startswith(f"{p}.") for p in closed):
                    continue
                fits = settings.n_of_m is None or module.in_features % settings.n_of_m[1] == 0
                name = f"{run_name(key)}/{path}.weight"
                (layers if fits else refused).append(Layer(name, run_name(key), module, spec.tokens_first))
    if refused and layers:
        logger.warning("%s (%d in all) stay dense: %s", refused[0].name, len(refused), _odd(refused[0], settings))
    if not layers:
        reason = _odd(refused[0], settings) if refused else "its blocks hold no plain linear layers"
        raise ModelError(f"sparsity fits no layer of {plan.model.transformer_class}: {reason}; leave sparsity out")
    return layers


def _odd(layer: Layer, settings: SparsityConfig) -> str:
    return f"rows of {layer.module.in_features} weights do not divide into groups for {settings.pattern}"


def sparsity_cost(settings: SparsityConfig, states: int, blocks: int) -> float:
    """What masks cost, in runs of the transformer on one state."""
    forwards = 2.0 * blocks * states if settings.allocation == "ecoflap" else 0.0
    return forwards + weight_cost(
        weight_criterion_named(settings.criterion), states, -(-blocks // settings.blocks_at_once)
    )


def make_masks(
    student: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[dict[str, Any]],
    settings: SparsityConfig,
    seed: int,
    shares: Mapping[str, float] | None = None,
) -> Tensors:
    """Choose the weights that stay.

    Args:
        student: The student, untrained; it is left as it is.
        layers: See :func:`sparse_layers`.
        batches: Training states.
        settings: Criterion, allocation, pattern.
        seed: Fixes what is drawn at random.
        shares: Of :func:`block_shares`, if they are known already.

    Returns:
        For each layer's name (o, i) on the CPU, true where a weight stays.

    Raises:
        ConfigError: The criterion cannot be loaded or gives something else than finite scores.
        BudgetError: The allocation's importances are not finite.
    """
    criterion = weight_criterion_named(settings.criterion)
    masks: Tensors = {}
    with frozen(student):
        shares = shares or block_shares(student, layers, batches, settings, seed)
        scores = weight_scores(student, layers, batches, criterion, settings.criterion, seed, settings.blocks_at_once)
        for layer, score in scores:
            nm = settings.n_of_m
            mask = row_mask(score, shares[layer.block]) if nm is None else n_of_m_mask(score, *nm)
            masks[layer.name] = mask.cpu()
    return masks


def block_shares(
    student: nn.Module, layers: Sequence[Layer], batches: Sequence[dict[str, Any]], settings: SparsityConfig, seed: int
) -> dict[str, float]:
    """The share of each block's weights that goes, by ``settings.allocation``; arguments as of :func:`make_masks`."""
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        members.setdefault(layer.block, []).append(layer)
    sizes = [sum(layer.module.weight.numel() for layer in block_layers) for block_layers in members.values()]
    importance = [0.0] * len(sizes)
    if settings.allocation == "ecoflap":
        importance = [
            block_importance(student, block_layers, batches, settings.epsilon, seed, number)
            for number, block_layers in enumerate(members.values())
        ]
    counts = COUNTS[settings.allocation](sizes, importance, settings.zeros, settings.slack)
    return {name: 1 - count / size for name, count, size in zip(members, counts, sizes, strict=True)}


@torch.no_grad()
def block_importance(
    student: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[dict[str, Any]],
    epsilon: float,
    seed: int,
    number: int,
) -> float:
    """Sum over batches of the gradient norm of one block's weights, from two forward passes each (ECoFLaP).

    The loss is <u, v(x)> with random signs u: that of distillation moves as much both ways where student and teacher
    agree, and would say zero.

    Args:
        student: Whose layers they are.
        layers: Of one block; copies of their weights alone are held.
        batches: Calibration states, the same ones both ways.
        epsilon: How far weights are moved.
        seed: For signs and directions.
        number: Of the block.
    """
    weights = [layer.module.weight for layer in layers]
    total = 0.0
    for step, arguments in enumerate(batches):

        def loss(at: int = step, given: dict[str, Any] = arguments) -> float:
            return float(signed_output(student, given, seed, at))

        directions = step_generator(seed, step * 8191 + number, Stream.WEIGHT_DIRECTIONS)
        total += gradient_norm(loss, weights, directions, epsilon)
    return total


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile: backward passes then end at the first layer that is looked at."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def zeros_of(transformer: nn.Module) -> dict[str, Any]:
    """What an exported transformer says of its sparsity, with the share of its weights that really are zero.

    Of one whose blocks are streamed the share is that of the masks it was trained with.

    Returns:
        ``pattern``, ``criterion``, ``allocation``, ``zeros`` (of all parameters), ``zeros_in_layers``; empty for a
        transformer without sparsity.
    """
    config: Any = getattr(transformer, "config", {})
    known = config.get("_ppcl")
    record = known.get("sparsity") if isinstance(known, dict) else None
    if not isinstance(record, dict) or not record:
        return {}
    if any(parameter.is_meta for parameter in transformer.parameters()):
        return dict(record)
    zeros = sum(int((parameter == 0).sum()) for parameter in transformer.parameters() if parameter.ndim == 2)
    whole = sum(parameter.numel() for parameter in transformer.parameters())
    return {**record, "zeros": zeros / whole}
