"""What a criterion is: a score for every unit of some modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ppcl.adapters import Adapter
from ppcl.slicing import Units


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

    def by_unit(self, features: Tensor) -> Tensor:
        """Split the last axis of what a layer reads, (..., h), into units: (..., units, features of a unit)."""
        return features.reshape(*features.shape[:-1], self.units.count, -1)


class Criterion(Protocol):
    """Scores units; only their order inside one module counts."""

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
