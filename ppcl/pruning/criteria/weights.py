"""Criteria of single weights: which of a layer's weights are worth keeping.

A criterion is a class with one method, from what was seen of one layer to a score for each of its weights: it stands in
its method's file beside the one for units, with an entry in ``WEIGHT_CRITERIA`` of :mod:`ppcl.config.extensions`, or in
a file of yours; ``sparsity.criterion`` names it. Weights are compared inside an
output row (:mod:`ppcl.pruning.criteria.weight_masks`), so only the order inside a row counts.

First-order criteria differentiate <u, v(x)> with random signs u, as those of units do. A gradient is a matrix as large
as its weight; only those of one block (or of a few) are ever there, so a first-order criterion takes one backward pass
a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ppcl.common.streams import Stream, step_generator
from ppcl.config.extensions import WEIGHT_CRITERIA
from ppcl.errors import ConfigError
from ppcl.pruning.criteria.base import BACKWARD, Batches, checked_scores, watch_layers
from ppcl.pruning.criteria.gradients import Tap, tap_gradients
from ppcl.teacher.families import adapter_for
from ppcl.teacher.families.masks import valid_rows

Needs = Literal["weights", "inputs", "gradients", "batch_gradients"]
NEEDS = ("weights", "inputs", "gradients", "batch_gradients")


@dataclass(frozen=True)
class Seen:
    """What was seen of one layer.

    Attributes:
        weight: (o, i) in float32.
        feature_rms: (i,), root mean square of each input feature; ones where inputs were not asked for or never came.
        gradient_norm: (o, i), mean over samples of each weight's |G|; zeros where gradients were not asked for.
        gradient_rms: (o, i), its root mean square.
        generator: For what is drawn at random.
    """

    weight: Tensor
    feature_rms: Tensor
    gradient_norm: Tensor
    gradient_rms: Tensor
    generator: torch.Generator


class WeightCriterion(Protocol):
    """Scores the weights of a layer.

    Attributes:
        needs: What must be seen: ``weights`` alone, ``inputs`` (one forward pass), ``gradients`` of single states or
            ``batch_gradients``, summed over a batch (inputs, too; a forward and a backward pass a block).
    """

    needs: Needs

    def score(self, seen: Seen) -> Tensor:
        """Score a layer's weights.

        Args:
            seen: Of the layer.

        Returns:
            (o, i); more is worth more.
        """
        ...


def weight_criterion_named(name: str) -> WeightCriterion:
    """The criterion of a name in the table, or of ``file.py:ClassName`` or ``module:ClassName``.

    Raises:
        ConfigError: It cannot be loaded.
    """
    criterion: WeightCriterion = WEIGHT_CRITERIA.named(name)
    if (needs := _needs(criterion)) not in NEEDS:
        raise ConfigError(f"sparsity.criterion={name}: needs is {needs!r}, expected one of {', '.join(NEEDS)}")
    return criterion


def _needs(criterion: WeightCriterion) -> Needs:
    return getattr(criterion, "needs", "gradients")


def weight_cost(criterion: WeightCriterion, states: int, passes: int) -> float:
    """What a criterion costs, in runs of the transformer on one state; first-order ones take several passes."""
    return {"weights": 0.0, "inputs": 1.0}.get(_needs(criterion), passes * BACKWARD) * states


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weights are scored.

    Attributes:
        name: Unlike any other's; after the last slash its path inside its block.
        block: Layers of one block are looked at together.
        module: The layer.
        tokens_first: See :class:`ppcl.pruning.criteria.gradients.Tap`.
    """

    name: str
    block: str
    module: nn.Linear
    tokens_first: bool = False

    @property
    def path(self) -> str:
        """Where it is inside its block."""
        return self.name.rpartition("/")[2].removesuffix(".weight")


class _Sums:
    """Running sums of one layer."""

    def __init__(self, layer: Layer, batched: bool) -> None:
        self.layer, self.batched = layer, batched
        weight = layer.module.weight
        self.squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        self.tokens = self.samples = 0
        self.norm: Tensor | float = 0.0
        self.power: Tensor | float = 0.0

    def see_inputs(self, x: Tensor) -> None:
        """Valid tokens, (tokens, i) in float32."""
        self.squares += x.pow(2).sum(0).double()
        self.tokens += len(x)

    def see(self, x: Tensor, delta: Tensor, valid: Tensor | None) -> None:
        self.see_inputs(valid_rows(x.detach(), valid).float())
        if self.batched:
            x, delta = x.flatten(0, 1)[None], delta.flatten(0, 1)[None]
        for inputs, slopes in zip(x, delta, strict=True):
            gradient = (slopes.T @ inputs).abs()
            self.norm = self.norm + gradient
            self.power = self.power + gradient.pow_(2)
            self.samples += 1

    def seen(self, generator: torch.Generator) -> Seen:
        weight = self.layer.module.weight.detach().float()
        rms = (self.squares / self.tokens).sqrt().float() if self.tokens else torch.ones_like(weight[0])
        count = max(1, self.samples)
        nothing = torch.zeros_like(weight) if not self.samples else None
        norm, power = (cast(Tensor, part) if nothing is None else nothing for part in (self.norm, self.power))
        return Seen(weight, rms, norm / count, (power / count).sqrt(), generator)


def weight_scores(
    transformer: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    criterion: WeightCriterion,
    name: str,
    seed: int,
    blocks_at_once: int = 1,
) -> Iterator[tuple[Layer, Tensor]]:
    """Score the weights of layers, one block's at a time: what was yielded is no longer held here.

    Args:
        transformer: Runs; its weights are left as they are.
        layers: Layers of it.
        batches: Calibration states.
        criterion: See :func:`weight_criterion_named`.
        name: Of the criterion, for messages.
        seed: Fixes what is drawn at random.
        blocks_at_once: Blocks whose gradients are summed in one pass.

    Yields:
        Each layer with (o, i) scores, finite.

    Raises:
        ConfigError: The criterion gives something else.
    """
    needs = _needs(criterion)
    adapter = adapter_for(transformer)
    sums = {layer.name: _Sums(layer, needs == "batch_gradients") for layer in layers}
    if needs == "inputs":
        watched = [(layer.module, layer.path) for layer in layers]
        watch_layers(transformer, adapter, watched, batches, lambda i, x: sums[layers[i].name].see_inputs(x))
    order = {block: i // blocks_at_once for i, block in enumerate(dict.fromkeys(layer.block for layer in layers))}
    number = 0
    for _, group in groupby(sorted(layers, key=lambda layer: order[layer.block]), key=lambda layer: order[layer.block]):
        members = list(group)
        if "gradients" in needs:
            taps = [Tap(layer.module, layer.path, layer.tokens_first, sums[layer.name].see) for layer in members]
            tap_gradients(transformer, adapter, taps, batches, seed)
        for layer in members:
            with torch.no_grad():
                generator = step_generator(seed, number, Stream.WEIGHT_SCORES)
                score = criterion.score(sums.pop(layer.name).seen(generator))
            number += 1
            shape = tuple(layer.module.weight.shape)
            where, expected = f"sparsity.criterion={name}: {layer.name}", f"one score for each weight, {shape}"
            yield layer, checked_scores(score, shape, where, expected)
