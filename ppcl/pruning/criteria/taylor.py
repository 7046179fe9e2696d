"""Taylor: a unit is worth how far the velocity moves when it goes, to first order.

A gate m = 1 multiplies what the unit gives. With v(x) the velocity, removing the unit moves it
by about dv/dm. For random signs u, E <u, dv/dm>^2 = ||dv/dm||^2, so the mean squared gradient
of <u, v(x)> over states is the mean squared movement: the diagonal of Gauss-Newton, and the
unit's sum of g W squared for each state. The distillation loss would not do: where student and
teacher agree, its gradient is zero for every unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.modules.slicing import features_last, scaled
from ppcl.pruning.criteria.base import BACKWARD, Batches, Scores, Site, Sites, checkpointed, hooked, signed_output
from ppcl.pruning.criteria.weights import Needs, Seen
from ppcl.teacher.families import Adapter


class Taylor:
    """Root mean square over states of d<u, v>/dm, one gate a unit and state.

    Gradients are taken of the gates alone, a number a unit: none of a weight is ever made. The gates of all sites
    ride on one backward pass a batch; diffusers' gradient checkpointing, where the class has it, keeps its memory
    to one block.
    """

    cost = BACKWARD

    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`."""
        totals = [torch.zeros(site.units.count, dtype=torch.float64) for site in sites]
        counts = [0] * len(sites)
        for step, arguments in enumerate(batches):
            for number, gradient in self._gradients(transformer, adapter, sites, arguments, seed, step).items():
                totals[number] += gradient.double().pow(2).sum(0).cpu()
                counts[number] += len(gradient)
        return [(total / max(1, count)).sqrt() for total, count in zip(totals, counts, strict=True)]

    def _gradients(
        self, transformer: Any, adapter: Adapter, sites: Sequence[Site], arguments: dict[str, Any], seed: int, step: int
    ) -> dict[int, Tensor]:
        """Gradients of the gates of one batch, (states, units) for each site that was called."""
        first = {spec.name: int(spec.tokens_first) for spec in adapter.stacks}
        gates: dict[int, Tensor] = {}

        def watch(number: int, site: Site, layer: nn.Linear) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
                h = features_last(layer, args[0])
                # a layer that sees no batch axis has one gate a unit for the whole call
                axis = first[site.stack] if h.ndim > 2 else None
                if number not in gates:  # both streams of an attention share it, and so does a recomputation
                    states = 1 if axis is None else h.shape[axis]
                    gates[number] = torch.ones(states, site.units.count, device=h.device, requires_grad=True)
                gate = gates[number].to(h.dtype)
                if axis is not None:
                    gate = gate.reshape(*(len(gate) if i == axis else 1 for i in range(h.ndim - 1)), -1)
                return (scaled(layer, args[0], site.spread(gate, h.shape[-1])), *args[1:])

            return hook

        with checkpointed(transformer), hooked(transformer, adapter, sites, watch), torch.enable_grad():
            inner = signed_output(transformer, arguments, seed, step)
            gradients = torch.autograd.grad(inner, list(gates.values()), allow_unused=True)
        return {n: g for n, g in zip(gates, gradients, strict=True) if g is not None}


class TaylorWeights:
    """|W_ij| sqrt(mean_s G_ij^2): to first order, how far the velocity moves when the weight goes."""

    needs: Needs = "gradients"

    def score(self, seen: Seen) -> Tensor:
        """See :class:`ppcl.pruning.criteria.weights.WeightCriterion`."""
        return seen.weight.abs() * seen.gradient_rms
