"""Criteria of single weights: which of a layer's weights are worth keeping.

A criterion is a class with one method, from what was seen of one layer to a score for each of its weights, and an entry
in ``WEIGHT_CRITERIA``, or a class in a file of yours; ``sparsity.criterion`` names it. Weights are compared inside an
output row (:mod:`ppcl.pruning.criteria.masks`), so only the order inside a row counts.

First-order criteria differentiate <u, v(x)> with random signs u, as those of units do. A gradient is a matrix as large
as its weight; only those of one block (or of a few) are ever there, so a first-order criterion takes one backward pass
a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ppcl.common.plugins import load_object
from ppcl.common.streams import step_generator
from ppcl.errors import ConfigError
from ppcl.pruning.criteria.base import BACKWARD
from ppcl.pruning.criteria.gradients import Tap, tap_gradients
from ppcl.pruning.criteria.masks import gblm_scores, magnitude_scores, wanda_scores
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity

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


class Magnitude:
    """|W|."""

    needs: Needs = "weights"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`WeightCriterion`."""
        return magnitude_scores(seen.weight)


class Random:
    """Drawn evenly from 0 to 1: the floor that a criterion has to beat."""

    needs: Needs = "weights"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`WeightCriterion`."""
        return torch.rand(seen.weight.shape, generator=seen.generator).to(seen.weight.device)


class Wanda:
    """|W_ij| a_j (Sun et al. 2023, arXiv 2306.11695)."""

    needs: Needs = "inputs"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`WeightCriterion`."""
        return wanda_scores(seen.weight, seen.feature_rms)


class Gblm:
    """|W_ij| a_j + alpha |W_ij| sum_s |G_ij| (Das et al. 2023, arXiv 2311.04902, its 1-norm).

    Both terms have the same median in every layer: the paper's alpha of 100 belongs to its loss and number of samples.
    """

    needs: Needs = "gradients"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`WeightCriterion`."""
        return gblm_scores(seen.weight, seen.feature_rms, seen.gradient_norm)


class Taylor:
    """|W_ij| sqrt(mean_s G_ij^2): to first order, how far the velocity moves when the weight goes."""

    needs: Needs = "gradients"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`WeightCriterion`."""
        return seen.weight.abs() * seen.gradient_rms


class Nirvana:
    """|W_ij G_ij| with the gradient summed over a batch (Ai et al. 2025, arXiv 2509.14230, its saliency)."""

    needs: Needs = "batch_gradients"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`WeightCriterion`."""
        return seen.weight.abs() * seen.gradient_norm


WEIGHT_CRITERIA: dict[str, WeightCriterion] = {
    "gblm": Gblm(),
    "magnitude": Magnitude(),
    "nirvana": Nirvana(),
    "random": Random(),
    "taylor": Taylor(),
    "wanda": Wanda(),
}


def weight_criterion_named(name: str) -> WeightCriterion:
    """The criterion of a name in the table, or of ``file.py:ClassName`` or ``module:ClassName``.

    Raises:
        ConfigError: It cannot be loaded.
    """
    if name in WEIGHT_CRITERIA:
        return WEIGHT_CRITERIA[name]
    made = load_object(name, "sparsity.criterion", {"score": ("seen",)})
    needs = getattr(made, "needs", "gradients")
    if needs not in NEEDS:
        raise ConfigError(f"sparsity.criterion={name}: needs is {needs!r}, expected one of {', '.join(NEEDS)}")
    return cast(WeightCriterion, made)


def weight_cost(criterion: WeightCriterion, states: int, passes: int) -> float:
    """What a criterion costs, in runs of the transformer on one state; first-order ones take several passes."""
    needs = getattr(criterion, "needs", "gradients")
    return {"weights": 0.0, "inputs": 1.0}.get(needs, passes * BACKWARD) * states


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weights are scored.

    Attributes:
        name: Unlike any other's.
        block: Layers of one block are looked at together.
        module: The layer.
        tokens_first: See :class:`ppcl.pruning.criteria.gradients.Tap`.
    """

    name: str
    block: str
    module: nn.Linear
    tokens_first: bool = False


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
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.squares += flat.pow(2).sum(0).double()
        self.tokens += len(flat)

    def see(self, x: Tensor, delta: Tensor) -> None:
        self.see_inputs(x)
        if self.batched:
            x, delta = x.flatten(0, 1)[None], delta.flatten(0, 1)[None]
        for one, slope in zip(x, delta, strict=True):
            gradient = (slope.T @ one).abs()
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
    batches: Sequence[dict[str, Any]],
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
    needs = getattr(criterion, "needs", "gradients")
    sums = {layer.name: _Sums(layer, needs == "batch_gradients") for layer in layers}
    if needs == "inputs":
        _watch_inputs(transformer, {sums[layer.name].see_inputs: layer.module for layer in layers}, batches)
    order = {block: i // blocks_at_once for i, block in enumerate(dict.fromkeys(layer.block for layer in layers))}
    number = 0
    for _, group in groupby(sorted(layers, key=lambda layer: order[layer.block]), key=lambda one: order[one.block]):
        members = list(group)
        if "gradients" in needs:
            taps = [Tap(layer.module, layer.tokens_first, sums[layer.name].see) for layer in members]
            tap_gradients(transformer, taps, batches, seed)
        for layer in members:
            with torch.no_grad():
                score = criterion.score(sums.pop(layer.name).seen(step_generator(seed, number, 71)))
            number += 1
            yield layer, _checked(score, layer, name)


@torch.no_grad()
def _watch_inputs(
    transformer: nn.Module,
    layers: Mapping[Callable[[Tensor], None], nn.Linear],
    batches: Sequence[dict[str, Any]],
) -> None:
    """Show what layers are given, in one forward pass a batch."""

    def hook_of(see: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: see(args[0])

    handles = [layer.register_forward_pre_hook(hook_of(see)) for see, layer in layers.items()]
    try:
        device = next(transformer.parameters()).device
        for arguments in batches:
            velocity(transformer, to_device(arguments, device))
    finally:
        for handle in handles:
            handle.remove()


def _checked(score: Any, layer: Layer, name: str) -> Tensor:
    where = f"sparsity.criterion={name}: {layer.name}"
    shape = tuple(layer.module.weight.shape)
    if not isinstance(score, Tensor) or tuple(score.shape) != shape:
        got = str(tuple(score.shape)) if isinstance(score, Tensor) else type(score).__name__
        raise ConfigError(f"{where}: got {got}, expected one score for each weight, {shape}")
    bad = int((~torch.isfinite(score)).sum())
    if bad:
        raise ConfigError(f"{where}: {bad} of {score.numel()} scores are NaN or infinite; expected numbers")
    return score.detach()
