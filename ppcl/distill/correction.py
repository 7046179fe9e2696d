"""The correction of a substitute in closed form: its last linear layers make up for what is missing.

A block adds to a stream what its last linear layer makes of a, times a gate, and nothing comes after that:

    h' = rest + g * (a W + b)

So the state that leaves a substitute is affine in W and b, and what is missing to the teacher's, r, is got by least
squares over all tokens of the student's own states, inside the block: no module and no parameter is added, and the
class stays. Gates differ by feature and token: a token is weighed by their mean square over features, w, and a feature
is scaled by its mean square over tokens, gamma^2 (exact where a gate is a product of both):

    W, b += (sum w a'^T a' + ridge)^-1 (sum a'^T (g * r)) / gamma^2        a' = (a, 1)

Tokens count by the teacher's norm, as in the loss. Which layers are the last ones, and their gates, is found by
gradients, so that no family has to say it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.sums import sampled_tokens
from ppcl.common.hooks import removing
from ppcl.distill.in_sweep import Ends, in_precision_of
from ppcl.teacher.families import Adapter, States
from ppcl.teacher.families.masks import valid_tokens
from ppcl.teacher.trace import BlockCall
from ppcl.training.distributed import Group

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # relative to the mean diagonal of the weighted Gram matrix
Pair = tuple[Tensor, Tensor]
ROWS_PER_FEATURE = 64  # about so many tokens enter the sums, for each input of a layer


class LayerSums:
    """What the least squares of one layer need, summed in float64.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, (outputs, inputs) = layer, layer.weight.shape
        size = inputs + (layer.bias is not None)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=layer.weight.device)

        self.gram, self.cross = zeros(size, size), zeros(size, outputs)
        self.squares, self.weight = zeros(outputs), zeros()

    def update(self, inputs: Tensor, gates: Tensor, missing: Tensor) -> None:
        """Add rows.

        Args:
            inputs: a, (rows, inputs).
            gates: g, (rows, outputs).
            missing: g * r, (rows, outputs).
        """
        if self.layer.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        weights = gates.pow(2).mean(1, keepdim=True)
        self.gram += (weights * inputs).T @ inputs
        self.cross += inputs.T @ missing
        self.squares += gates.pow(2).sum(0)
        self.weight += weights.sum()

    def solve(self, ridge: float) -> list[Tensor]:
        """What is to be added to weight and bias, if there is one; nothing where the sums do not tell."""
        gram, size = self.gram.clone(), self.layer.in_features
        gram.diagonal()[:size] += ridge * gram.diagonal()[:size].mean()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            return [torch.zeros_like(parameter) for parameter in self.layer.parameters()]
        scales = self.squares / self.weight
        added = torch.cholesky_solve(self.cross, factor) * torch.where(scales > 0, 1 / scales, 0)
        return [added[:size].T, *added[size:]]


@torch.no_grad()
def correct(
    block: nn.Module, ends: Ends, held_out_loss: Callable[[], float], group: Group
) -> tuple[float, float] | None:
    """Correct a substitute on the states that the student hands to it.

    Args:
        block: Changed in place, of what is trained in it alone.
        ends: The states at its run's ends.
        held_out_loss: Its loss on other states, which chooses the ridge, or no correction where none helps.
        group: The processes that have the states; all do the same to the block.

    Returns:
        The loss before and after; None of a block that no layer of can be corrected.
    """
    course, adapter = ends.after, ends.after.source.adapter
    train = [batch for batch in course.batches if batch.split == "train"]
    first, num_states = in_precision_of(block, ends.calls(train[0].load())[0]), sum(len(b.rows) for b in train)
    sums = {name: LayerSums(layer) for name, layer in last_layers(adapter, block, first).items()}
    if not sums:
        return None
    for batch in course.own:
        if batch.split == "train":
            _add(adapter, block, ends.calls(batch.load()), sums, (batch.first, num_states))
    for each in sums.values():
        group.sum_tensors([each.gram, each.cross, each.squares, each.weight])
    parameters = [parameter for each in sums.values() for parameter in each.layer.parameters()]
    start = best = [parameter.clone() for parameter in parameters]
    before = least = group.gather(held_out_loss())[0]
    for ridge in RIDGES:
        added = [tensor for each in sums.values() for tensor in each.solve(ridge)]
        trial = [(old + more).to(old.dtype) for old, more in zip(start, added, strict=True)]
        _set(parameters, trial)
        if (loss := group.gather(held_out_loss())[0]) < least:
            least, best = loss, trial
    _set(parameters, best)
    return before, least


def last_layers(adapter: Adapter, block: nn.Module, call: BlockCall) -> dict[str, nn.Linear]:
    """The linear layers that what leaves a block is affine in, by their paths: nothing but gates comes after them.

    Args:
        adapter: The family.
        block: Of its layers those count that are trained.
        call: Any call of it.
    """
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    outputs, calls = _watch(adapter, block, call, layers)
    last = {}
    for name, pairs in calls.items():
        gradients = [_pull(outputs, {stream: torch.ones_like(o) for stream, o in outputs.items()}, y) for _, y in pairs]
        if all(leaf.ndim == 3 for _, leaf in pairs) and any(gradient is not None for gradient in gradients):
            last[name] = layers[name]
    return {
        name: layer for name, layer in last.items() if _is_affine(adapter, block, call, layer, outputs, calls[name])
    }


def _is_affine(
    adapter: Adapter, block: nn.Module, call: BlockCall, layer: nn.Linear, outputs: States, pairs: Sequence[Pair]
) -> bool:
    """Whether no other weights see what a layer gives, and other numbers of it move the states as its gradient says."""
    steps = [leaf.detach().roll(1, -1).requires_grad_() for _, leaf in pairs]
    left = iter(steps)
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad)

    others = (m for m in block.modules() if m is not layer and next(m.parameters(recurse=False), None) is not None)
    looks = (m.register_forward_pre_hook(look, with_kwargs=True) for m in others if m is not block)
    with removing([layer.register_forward_hook(lambda _, __, y: y + next(left))]), removing(looks):
        moved = _call(adapter, block, call)
    moves = {stream: (moved[stream] - state).detach() for stream, state in outputs.items()}
    size = sum(float(move.pow(2).sum()) for move in moves.values())
    expected = 0.0
    for (_, leaf), step in zip(pairs, steps, strict=True):
        gradient = _pull(outputs, moves, leaf)
        expected += 0.0 if gradient is None else float((gradient * step.detach()).sum())
    return not seen and size > 0 and abs(expected / size - 1) < 1e-2


def _add(
    adapter: Adapter,
    block: nn.Module,
    ends: tuple[BlockCall, BlockCall],
    sums: Mapping[str, LayerSums],
    place: tuple[int, int],
) -> None:
    """Add a batch to the sums of all layers; its place is that of its first state, and their number."""
    start, end = in_precision_of(block, ends[0]), ends[1]
    outputs, calls = _watch(adapter, block, start, {name: each.layer for name, each in sums.items()})
    masks = valid_tokens(end.stack, end.arguments)
    weights, missing = {}, {}
    for stream, output in outputs.items():
        target = end.outputs[stream].to(output.dtype)
        weight = target.pow(2).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        if stream in masks:
            weight = weight * masks[stream][..., None]
        weights[stream] = weight.expand_as(output)
        missing[stream] = weight.pow(2) * (target - output.detach())
    for name, pairs in calls.items():
        for inputs, leaf in pairs:
            gates, rest = _pull(outputs, weights, leaf), _pull(outputs, missing, leaf)
            if gates is not None and rest is not None:
                rows = [end.stack.turn(x) for x in (inputs, gates, rest)]
                chosen = sampled_tokens(rows[0], rows[1].any(-1), *place, ROWS_PER_FEATURE)
                sums[name].update(*(x[chosen] for x in rows))


def _watch(
    adapter: Adapter, block: nn.Module, call: BlockCall, layers: Mapping[str, nn.Linear]
) -> tuple[States, dict[str, list[Pair]]]:
    """Run a block; returns its states after it, and of each call of a layer the input, and the output as a leaf."""
    pairs: dict[str, list[Pair]] = {name: [] for name in layers}

    def leaf_of(name: str) -> Callable[..., Tensor]:
        def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            pairs[name].append(((args or tuple(kwargs.values()))[0].detach(), output.detach().requires_grad_()))
            return pairs[name][-1][1]

        return cut

    with removing(layer.register_forward_hook(leaf_of(name), with_kwargs=True) for name, layer in layers.items()):
        return _call(adapter, block, call), pairs


def _call(adapter: Adapter, block: nn.Module, call: BlockCall) -> States:
    """Run a block; the graph begins where a hook lets it, not at its weights."""
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    try:
        block.requires_grad_(False)
        with torch.enable_grad():
            return adapter.call(call.stack, block, call.inputs, call.arguments)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _pull(outputs: States, weights: States, leaf: Tensor) -> Tensor | None:
    """The gradient of sum <weights, outputs> by a leaf; None where they do not depend on it."""
    roots = [(state, weights[stream]) for stream, state in outputs.items() if state.requires_grad]
    if not roots:
        return None
    states, gradients = zip(*roots, strict=True)
    found: Tensor | None = torch.autograd.grad(states, leaf, gradients, retain_graph=True, allow_unused=True)[0]
    return found


def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
