"""BiP: unit scores by bi-level optimisation (Zhang et al. 2022, arXiv 2210.04092).

Upper level: which units stay, z = top-k(m). Lower level: weights theta retrained for these units. The gradient of the
upper level has an implicit part, since theta follows m. With the paper's assumption that the loss is linear enough in
the masked weights (no Hessian), d theta / dm = -(1/gamma) diag(g), where g is the gradient by the masked
weights z theta:

    dl/dm = theta g - (1/gamma) m g^2, summed here over the weights of a unit.

The published code squares the mask's gradient in the second part and lets scores and weights share memory; this is the
paper's formula, on copies. Scores are trained by SGD with momentum, as there; its rate is not 0.1, which belongs to
another loss's scale, but follows from how far scores may go (:class:`ppcl.training.optimizers.ScaledSGD`): a few times
their spread when they start, which is that of the weights' norms. Other differences from the paper: masks are of units,
not of single weights; 1/gamma is the lower level's own step size, of which it is the derivative, instead of 1e-4.

Decision: BiP is a criterion and not a search, because its gates are of neurons and heads. What it finds out is which
of them are worth keeping; how many stay where is the planner's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcl.common.hooks import removing
from ppcl.modules.slicing import features_last, matrix_of
from ppcl.pruning.criteria.base import BACKWARD, Batches, Scores, Sites, checkpointed, unit_sums
from ppcl.pruning.criteria.gradients import _Tap
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter
from ppcl.training.optimizers import ScaledSGD

KEEP = 0.5  # share of a module's units that the masks leave in
EPOCHS = 4
TRAVEL = 5.0  # of a module's scores, in their spread when they start (ScaledSGD)
WEIGHT_RATE = 1e-3  # a step of the lower level, relative to the norm of the layer's weights

Layer = tuple[int, str]  # number of the site, path in its module
See = Callable[[Layer, Tensor], None]


def upper_gradient(theta: Tensor, gradient: Tensor, mask: Tensor, step: float | Tensor) -> Tensor:
    """BiP's gradient of the upper level, theta g - (1/gamma) m g^2, weight by weight.

    Args:
        theta: Weights of the lower level.
        gradient: g, of the loss by the masked weights; of the same shape.
        mask: m, that broadcasts to it.
        step: 1/gamma, the step size of the lower level.

    Returns:
        dl/dm of every weight; a unit's is the sum over its own.
    """
    return theta * gradient - step * mask * gradient.pow(2)


class Bip:
    """Alternate one step of the weights that read the units, and one of the scores, on different batches.

    The loss is the squared relative velocity error of the masked model. It has a gradient, since a mask is there. Held
    in memory: a float32 copy of the layers that read units, and one layer's gradient at a time; no weight's ``.grad``.
    """

    cost = 1 + EPOCHS * 2 * BACKWARD

    def score(self, transformer: nn.Module, adapter: Adapter, sites: Sites, batches: Batches, seed: int) -> Scores:
        """See :class:`ppcl.pruning.criteria.base.Criterion`; with one batch alone, both levels see that."""
        if not sites or not batches:
            return [torch.ones(site.units.count, dtype=torch.float64) for site in sites]
        steps = EPOCHS * len(batches)
        state = _State(transformer, adapter, sites, steps)
        device = next(transformer.parameters()).device
        moved = [to_device(arguments, device) for arguments in batches]
        with torch.no_grad():
            targets = [velocity(transformer, arguments) for arguments in moved]
        pairs = list(zip(moved, targets, strict=True))
        for step in range(steps):
            state.backward(*pairs[step % len(pairs)], state.lower)
            state.begin_upper()
            state.backward(*pairs[(step + 1) % len(pairs)], state.upper)
            state.finish_upper()
        return [(score.detach() - score.detach().min()).double().cpu() for score in state.scores]


class _State:
    """Scores, masks and copies of the layers that read units."""

    def __init__(self, transformer: nn.Module, adapter: Adapter, sites: Sites, steps: int) -> None:
        self.transformer, self.sites = transformer, sites
        self.layers: dict[Layer, nn.Linear] = {
            (number, name): layer
            for number, site in enumerate(sites)
            for name, layer in site.layers(transformer, adapter).items()
        }
        self.theta = {key: matrix_of(layer).detach().float() for key, layer in self.layers.items()}
        self.rates = dict.fromkeys(self.theta, 0.0)
        self.scores = [self._first_score(number) for number in range(len(sites))]
        distances = [TRAVEL * float(score.std(correction=0)) for score in self.scores]
        self.optimizer = ScaledSGD([[score] for score in self.scores], distances, steps)

    def _first_score(self, number: int) -> Tensor:
        """Scores start at the size of the weights, with mean 1."""
        units = self.sites[number].units
        squares = [
            unit_sums(theta.pow(2), units, 1, name) for (site, name), theta in self.theta.items() if site == number
        ]
        size = torch.stack(squares).sum(0).sqrt()
        return size / size.mean().clamp_min(1e-12)

    def mask(self, number: int) -> Tensor:
        """The units that stay, z = top-k(m), (units,); of equal scores the first."""
        score = self.scores[number]
        kept = score.argsort(descending=True, stable=True)[: max(1, round(KEEP * len(score)))]
        return torch.zeros_like(score).index_fill(0, kept, 1.0)

    def backward(self, arguments: dict[str, Any], target: Tensor, see: See) -> None:
        """One pass of the masked model, which shows each layer's gradient once and frees it."""
        anchor = torch.zeros((), requires_grad=True)
        with self._masked(anchor, see), checkpointed(self.transformer), torch.enable_grad():
            output = velocity(self.transformer, arguments)
            loss = (output.float() - target.float()).pow(2).sum() / target.float().pow(2).sum()
            torch.autograd.grad(loss, [anchor], allow_unused=True)

    def _masked(self, anchor: Tensor, see: See) -> AbstractContextManager[None]:
        """The model with masked units and the lower level's weights in the layers that read them."""
        masks = [self.mask(number) for number in range(len(self.sites))]

        def hook_of(key: Layer) -> Callable[[Any, tuple[Any, ...], Tensor], Any]:
            number, _ = key

            def hook(layer: Any, args: tuple[Any, ...], output: Tensor) -> Any:
                x = features_last(layer, args[0])
                gated = x * self.sites[number].spread(masks[number].to(x.dtype), x.shape[-1])
                masked = F.linear(gated, self.theta[key].to(x.dtype), layer.bias)

                def seen(x: Tensor, delta: Tensor) -> None:
                    see(key, delta.flatten(0, -2).float().T @ x.flatten(0, -2).float())

                shown = _Tap.apply(masked, x, anchor, seen)  # type: ignore[no-untyped-call]
                return shown.movedim(-1, 1) if isinstance(layer, nn.Conv2d) else shown

            return hook

        return removing(layer.register_forward_hook(hook_of(key)) for key, layer in self.layers.items())

    def _columns(self, number: int, values: Tensor, like: Tensor) -> Tensor:
        """One value a unit, spread over the columns of a layer that reads them: (1, i)."""
        return self.sites[number].spread(values, like.shape[1])[None]

    def lower(self, key: Layer, gradient: Tensor) -> None:
        """One step of a layer's weights. Makes new ones: the pass still needs the old."""
        theta = self.theta[key]
        slope = gradient * self._columns(key[0], self.mask(key[0]), theta)
        self.rates[key] = float(WEIGHT_RATE * theta.norm() / slope.norm().clamp_min(1e-20))
        self.theta[key] = theta - self.rates[key] * slope

    def begin_upper(self) -> None:
        """Forget the last step's gradient of the scores."""
        for score in self.scores:
            score.grad = torch.zeros_like(score)

    def upper(self, key: Layer, gradient: Tensor) -> None:
        """A layer's part of the gradient of the scores."""
        number, theta = key[0], self.theta[key]
        whole = upper_gradient(theta, gradient, self._columns(number, self.mask(number), theta), self.rates[key])
        grad = self.scores[number].grad
        assert grad is not None  # begin_upper made it
        grad += unit_sums(whole, self.sites[number].units, 1, key[1])

    def finish_upper(self) -> None:
        """One step of the scores."""
        self.optimizer.step()
