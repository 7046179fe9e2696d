"""What a criterion is: a score for every unit of some modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppcl.common.streams import step_generator
from ppcl.modules.slicing import Units
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter

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
        """The linear layers that read the units, by path inside the module."""
        module = self.module(transformer, adapter)
        found = {name: module.get_submodule(name) for name in self.units.columns}
        return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}

    def weights(self, transformer: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Linear, int]]:
        """All linear layers that hold weights of the units, by path: those that make them (0), those that read (1)."""
        module = self.module(transformer, adapter)
        named = [(name, side) for side, names in enumerate((self.units.rows, self.units.columns)) for name in names]
        found = {name: (module.get_submodule(name), side) for name, side in named}
        return {name: (layer, side) for name, (layer, side) in found.items() if isinstance(layer, nn.Linear)}

    def by_unit(self, features: Tensor) -> Tensor:
        """Split the last axis of what a layer reads, (..., h), into units: (..., units, features of a unit)."""
        return features.reshape(*features.shape[:-1], self.units.count, -1)


def unit_sums(values: Tensor, units: Units, side: int) -> Tensor:
    """Sum what is known of each weight of a layer to its units.

    Args:
        values: (o, i), one for each weight.
        units: Of the layer's module.
        side: 0 for a layer that makes the units, 1 for one that reads them.

    Returns:
        (units,), each the sum over the unit's rows or columns.
    """
    features = values.sum(1 - side)
    if units.kind == "heads":  # a head's features lie side by side, a gated network's in two halves
        return features.reshape(units.count, -1).sum(1)
    return features.reshape(-1, units.count).sum(0)


class Criterion(Protocol):
    """Scores units; only their order inside one module counts.

    Attributes:
        cost: Runs of the transformer on one state, for each state; a forward and a backward pass are ``BACKWARD``.
    """

    @property
    def cost(self) -> float:
        """See above."""
        ...

    def score(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        batches: Sequence[dict[str, Any]],
        seed: int,
    ) -> list[Tensor]:
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


@torch.no_grad()
def watch_inputs(
    transformer: nn.Module,
    adapter: Adapter,
    sites: Sequence[Site],
    batches: Sequence[dict[str, Any]],
    see: Callable[[int, nn.Linear, Tensor], None],
) -> None:
    """Show a criterion what every layer that reads units is given, in one forward pass a batch.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: Whose layers.
        batches: Calibration states.
        see: Called with the number of the site, the layer, and (tokens of all states, h) in float32.
    """

    def watch(number: int, _: Site, layer: nn.Linear) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: see(number, layer, args[0].flatten(0, -2).float())

    device = next(transformer.parameters()).device
    with hooked(transformer, adapter, sites, watch):
        for arguments in batches:
            velocity(transformer, to_device(arguments, device))


@contextmanager
def hooked(
    transformer: nn.Module,
    adapter: Adapter,
    sites: Sequence[Site],
    make: Callable[[int, Site, nn.Linear], Callable[[nn.Module, tuple[Any, ...]], Any]],
) -> Iterator[None]:
    """Hook what every layer that reads units is given.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        sites: Whose layers.
        make: From number, site and layer to the forward pre-hook.
    """
    handles = [
        layer.register_forward_pre_hook(make(number, site, layer))
        for number, site in enumerate(sites)
        for layer in site.layers(transformer, adapter).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    signs = torch.randint(2, output.shape, generator=step_generator(seed, step, 61)).to(device) * 2.0 - 1
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
