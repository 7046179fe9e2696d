"""What a criterion is: a score for every unit of some modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.common.hooks import removing
from ppcl.common.streams import Stream, step_generator
from ppcl.errors import ConfigError
from ppcl.modules.parts import join
from ppcl.modules.slicing import Units, features_last
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter
from ppcl.teacher.families.masks import valid_rows, watch_valid

Hook = Callable[[nn.Module, tuple[Any, ...]], Any]  # before a forward pass
BACKWARD = 4.0  # a forward and a backward pass with gradient checkpointing, in forward passes


@dataclass(frozen=True)
class Site:
    """A module whose units are scored.

    Attributes:
        stack: Name of the block list.
        block: Number of the block in it.
        path: The module inside the block.
        units: What its units are.
    """

    stack: str
    block: int
    path: str
    units: Units

    def module(self, transformer: nn.Module, adapter: Adapter) -> nn.Module:
        """The module itself."""
        spec = next(s for s in adapter.stacks if s.name == self.stack)
        return adapter.blocks(transformer, spec)[self.block].get_submodule(self.path)

    def layers(self, transformer: nn.Module, adapter: Adapter) -> dict[str, nn.Linear]:
        """The layers that read the units, by path inside the module; convolutions of one pixel among them."""
        return {name: layer for name, (layer, side) in self.weights(transformer, adapter).items() if side}

    def weights(self, transformer: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Linear, int]]:
        """All layers that hold weights of the units, by path: those that make them (0), those that read them (1)."""
        module = self.module(transformer, adapter)
        named = [(name, side) for side, names in enumerate((self.units.rows, self.units.columns)) for name in names]
        return {name: (cast(nn.Linear, module.get_submodule(name)), side) for name, side in named}

    def by_unit(self, features: Tensor) -> Tensor:
        """Split the last axis of what a layer reads, (..., h), into units: (..., units, features of a unit)."""
        unit = self.units.of_features(features.shape[-1], self.units.columns[0])
        index = np.argsort(unit, kind="stable")[np.count_nonzero(unit < 0) :].reshape(self.units.count, -1)
        return features[..., torch.tensor(index, device=features.device)]

    def spread(self, values: Tensor, features: int) -> Tensor:
        """A value of each unit, (..., units), for each feature that a layer reads, (..., features); 1 for others."""
        unit = self.units.of_features(features, self.units.columns[0])
        padded = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)
        return padded[..., torch.tensor(unit, device=values.device)]


def unit_sums(values: Tensor, units: Units, side: int, layer: str = "") -> Tensor:
    """Sum what is known of each weight of a layer to its units.

    Args:
        values: (o, i), one for each weight.
        units: Of the layer's module.
        side: 0 for a layer that makes the units, 1 for one that reads them.
        layer: Its path inside the module.

    Returns:
        (units,), each the sum over the unit's rows or columns.
    """
    features = values.sum(1 - side)
    unit = torch.tensor(units.of_features(len(features), layer), device=features.device)
    sums = features.new_zeros(units.count + 1).index_add(0, unit % (units.count + 1), features)
    return sums[:-1]  # the last one is what belongs to no unit


Sites = Sequence[Site]
Batches = Sequence[dict[str, Any]]  # of calibration states
Scores = list[Tensor]  # (units,) of each site


class Criterion(Protocol):
    """Scores units; only their order inside one module counts.

    Attributes:
        cost: Runs of the transformer on one state, for each state; a forward and a backward pass are ``BACKWARD``.
    """

    @property
    def cost(self) -> float:
        """See above."""
        ...

    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """Score the units of all sites, in as many passes over the batches as the criterion needs.

        Args:
            transformer: The teacher's transformer; it is left as it is.
            adapter: Its family.
            sites: Whose units.
            batches: Calibration states.
            seed: Fixes what is drawn at random.

        Returns:
            For each site one float of at least 0 a unit, (units,) in float64; more is worth more.
        """
        ...


@dataclass(frozen=True)
class InputSums:
    """Of a layer's inputs over the valid tokens of all states: their number, their sum and that of squares, (h,)."""

    count: int
    first: Tensor
    second: Tensor


@runtime_checkable
class SumCriterion(Protocol):
    """A criterion that needs no more than these sums: a sweep scores the units of a block while it is there."""

    def score_sums(self, site: Site, layers: Sequence[tuple[nn.Linear, InputSums]]) -> Tensor:
        """Score the units of a site, (units,) in float64, from the layers that read them."""
        ...


def checked_scores(scores: Any, shape: tuple[int, ...], where: str, expected: str) -> Tensor:
    """Scores as a criterion returned them, if they can be used.

    Args:
        scores: What it returned for one site or layer.
        shape: That they must have.
        where: Which setting, site and layer, for the message.
        expected: In words.

    Raises:
        ConfigError: They have another shape, or some are NaN or infinite.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = str(tuple(scores.shape)) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(f"{where}: got {got}, expected {expected}")
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ConfigError(f"{where}: {bad} of {scores.numel()} scores are NaN or infinite; expected numbers")
    return scores.detach()


def watch_inputs(
    transformer: nn.Module,
    adapter: Adapter,
    sites: Sites,
    batches: Batches,
    see: Callable[[int, nn.Linear, Tensor], None],
) -> None:
    """Show a criterion what every layer that reads units is given; see :func:`watch_layers`.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: Whose layers.
        batches: Calibration states.
        see: Called with the number of the site, the layer, and (valid tokens of all states, h) in float32.
    """
    readers = [
        (number, layer, join(site.path, name))
        for number, site in enumerate(sites)
        for name, layer in site.layers(transformer, adapter).items()
    ]

    def see_layer(index: int, x: Tensor) -> None:
        see(*readers[index][:2], x)

    watch_layers(transformer, adapter, [reader[1:] for reader in readers], batches, see_layer)


@torch.no_grad()
def watch_layers(
    transformer: nn.Module,
    adapter: Adapter,
    layers: Sequence[tuple[nn.Linear, str]],
    batches: Batches,
    see: Callable[[int, Tensor], None],
) -> None:
    """Show what layers are given, in one forward pass a batch; padding is left out.

    Args:
        transformer: The layers' transformer.
        adapter: Its family.
        layers: With their paths inside their blocks.
        batches: Calibration states.
        see: Called with the number of the layer and (valid tokens of all states, i) in float32.
    """
    device = next(transformer.parameters()).device
    with watch_valid(transformer, adapter) as valid_of:

        def hook_of(number: int, path: str) -> Hook:
            def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
                x = features_last(layer, args[0])
                see(number, valid_rows(x, valid_of(path, x)).float())

            return hook

        watched = enumerate(layers)
        with removing(layer.register_forward_pre_hook(hook_of(number, path)) for number, (layer, path) in watched):
            for arguments in batches:
                velocity(transformer, to_device(arguments, device))


def hooked(
    transformer: nn.Module, adapter: Adapter, sites: Sites, make: Callable[[int, Site, nn.Linear], Hook]
) -> AbstractContextManager[None]:
    """Hook for a while what every layer that reads units is given.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: Whose layers.
        make: From number, site and layer to the forward pre-hook.
    """
    return removing(
        layer.register_forward_pre_hook(make(number, site, layer))
        for number, site in enumerate(sites)
        for layer in site.layers(transformer, adapter).values()
    )


def signed_output(transformer: nn.Module, arguments: dict[str, Any], seed: int, step: int) -> Tensor:
    """The functional of the output that first-order criteria differentiate: <u, v(x)> with random signs u.

    The distillation loss would not do: where student and teacher agree its gradient is zero.

    Args:
        transformer: Runs with gradients, if the caller lets it.
        arguments: One batch of states.
        seed: Fixes the signs, with ``step``.
        step: Number of the batch.

    Returns:
        A scalar, the sum over the batch.
    """
    device = next(transformer.parameters()).device
    output = velocity(transformer, to_device(arguments, device)).float()
    generator = step_generator(seed, step, Stream.OUTPUT_SIGNS)
    signs = torch.randint(2, output.shape, generator=generator).to(device) * 2.0 - 1
    return (output * signs).sum()


@contextmanager
def checkpointed(transformer: Any) -> Iterator[None]:
    """Diffusers' gradient checkpointing, where the class has it: activations of one block at a time."""
    spare = getattr(transformer, "_supports_gradient_checkpointing", False)
    spare = spare and not transformer.is_gradient_checkpointing
    if spare:
        transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if spare:
            transformer.disable_gradient_checkpointing()
