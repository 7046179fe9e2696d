"""What modulation layers are given, between the recorded timesteps as well.

A modulation layer reads the conditioning, which the transformer's embedders make of the timestep (and of a pooled text
or a guidance, where the family has them) before any block runs. So its inputs are known at any timestep without
running a block: recorded calls go up to the first block with another timestep put in. Low ranks are fitted on training
prompts at a dense range of timesteps, and judged on held-out prompts at others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.findings import Findings
from ppcl.analysis.sweep import Batch, Seen
from ppcl.capture.states import States
from ppcl.common.hooks import removing
from ppcl.common.streams import Stream, step_generator
from ppcl.modules.replacements import InputStatistics, affine_of, residuals
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.call_arguments import batch_size, to_device
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.training.distributed import SINGLE, Group

logger = logging.getLogger(__name__)
Layer = tuple[str, int, str]  # stack, block, stream

# Sinusoids of timestep * 1000 turn round 160 times over the range: several points a turn.
ROWS = 1024
FIRST_SHARE = 1 / 16  # of the rows at the highest timestep, as in a schedule of 16 steps


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a modulation layer.

    Attributes:
        fitted: What low ranks are fitted on: training prompts at a dense range of timesteps.
        judges: What they are judged on: held-out prompts at other timesteps of that range, and at the recorded ones.
    """

    fitted: InputStatistics
    judges: tuple[InputStatistics, ...]

    def missed(self, weight: Tensor) -> Tensor:
        """The share of the layer's varying output that each rank 0..k misses where it is missed most.

        Args:
            weight: (o, d).

        Returns:
            (k + 1,).
        """
        return torch.stack([residuals(weight, self.fitted, judge) for judge in self.judges]).amax(0)


@torch.no_grad()
def conditioning(
    transformer: nn.Module, adapter: Adapter, splits: Mapping[str, States], batch: int, seed: int
) -> dict[Layer, Conditioning]:
    """Find out what each modulation layer is given.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        splits: ``train`` and ``held-out`` states.
        batch: States at a time.
        seed: Fixes the timesteps.

    Returns:
        By layer; layers with the same inputs share one entry. A layer whose input is not made before the blocks run
        has none.
    """
    layers = modulation_layers(transformer, adapter)
    if not layers:
        return {}
    sources = sources_of(transformer, layers, next(splits["train"].batches(batch, batch)))
    inner = {source: layers[source] for source in set(sources.values())}
    known = _conditions_of(transformer, inner, splits, batch, seed)
    return {layer: known[source] for layer, source in sources.items()}


def _conditions_of(
    transformer: nn.Module, layers: Mapping[Layer, nn.Module], splits: Mapping[str, States], batch: int, seed: int
) -> dict[Layer, Conditioning]:
    """What layers of the very first block are given."""
    train, held_out = splits["train"], splits["held-out"]
    name = timestep_argument(train.calls)
    if name is None:
        logger.warning(
            "the recorded states are of one timestep, or which argument tells it is not clear: ranks of modulation "
            "layers are fitted and judged on the recorded calls alone"
        )
    seen = None if name is None else torch.cat([call.arguments[name].flatten() for call in train.calls])

    def statistics(states: States, draw: int, dense: bool) -> dict[Layer, InputStatistics]:
        generator = step_generator(seed, draw, Stream.TIMESTEPS)
        points = None if seen is None or not dense else timesteps(seen, ROWS, generator)
        rows = modulation_inputs(transformer, layers, _calls(states, batch, name, points))
        return {source: InputStatistics.of(inputs) for source, inputs in rows.items()}

    fitted = statistics(train, 0, dense=True)
    judges = [statistics(held_out, 1, dense) for dense in ((False,) if seen is None else (False, True))]
    return {layer: Conditioning(fitted[layer], tuple(judge[layer] for judge in judges)) for layer in layers}


class Modulations:
    """Which modulation layers are given what the very first block's are, and what each rank of them misses.

    A consumer of the forward sweep; its findings are ``source`` and ``missed``, by stream.

    Args:
        source: The teacher's blocks.
        first: The first batch of the sweep, on which inputs are compared.
        splits: ``train`` and ``held-out`` states.
        size: States at a time.
        seed: Fixes the timesteps.
        findings: Receives the results.
        group: The processes that sweep; each judges other layers, the first one compares and writes.

    Attributes:
        conditions: Of the first block's layers, those of equal inputs once.
    """

    def __init__(
        self,
        source: Blocks,
        first: Batch,
        splits: Mapping[str, States],
        size: int,
        seed: int,
        findings: Findings,
        group: Group = SINGLE,
    ) -> None:
        self.first, self.findings, self.group = first, findings, group
        self.spec, self.index, self.block = source.spec(source.order[0]), 0, nn.Module()
        self.sources: dict[str, Layer] = {}
        self.inputs: dict[Layer, Tensor] = {}
        self.conditions: dict[Layer, Conditioning] = {}
        if not self.spec.modulation:
            return
        with torch.no_grad(), source.block(self.spec.name, 0) as block:
            paths = self.spec.modulation.items()
            layers = {(self.spec.name, 0, stream): block.get_submodule(path) for stream, path in paths}
            for layer, x in _inputs(source.transformer, layers, first.load().arguments).items():
                if self._source(x) is None:
                    self.inputs[layer] = x
            distinct = {layer: layers[layer] for layer in self.inputs}
            self.conditions = _conditions_of(source.transformer, distinct, splits, size, seed)

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Every block with a modulation counts."""
        self.spec, self.index, self.block, self.sources = stack, index, block, {}
        return list(stack.modulation.values()) if stack.modulation else None

    def see(self, seen: Seen) -> None:
        """Compare what the layers are given on the first batch."""
        if seen.batch.number != self.first.number:
            return
        for stream, path in self.spec.modulation.items():
            source = self._source(seen.layers[path][-1].input.flatten(0, -2))
            if source is None:
                _warn(self.spec.name, self.index, stream)
            else:
                self.sources[stream] = source

    def finish(self) -> None:
        """Judge the ranks of this block's layers."""
        sources = self.group.on_main(lambda: self.sources)  # the first process saw the first batch

        def judge(own: dict[str, Layer]) -> dict[str, list[float]]:
            missed = {}
            for stream, source in own.items():
                weight, _ = affine_of(self.block.get_submodule(self.spec.modulation[stream]))
                missed[stream] = self.conditions[source].missed(weight).tolist()
            return missed

        found = {"source": sources, "missed": self.group.spread(sources, judge)}
        self.group.on_main(lambda: self.findings.write("modulation", (self.spec.name, self.index), {}, found))

    def _source(self, x: Tensor) -> Layer | None:
        return next((layer for layer, known in self.inputs.items() if torch.equal(known, x)), None)


def _warn(*layer: str | int) -> None:
    logger.warning("%s.%d: the modulation of the %s depends on the blocks before; no low rank", *layer)


def timestep_argument(calls: Sequence[Call]) -> str | None:
    """Name the argument that tells the timestep: the only number of each sample that is not always the same."""
    varying = []
    for name, value in calls[0].arguments.items():
        if isinstance(value, Tensor) and value.ndim == 1 and name in calls[0].per_sample:
            values = torch.cat([call.arguments[name] for call in calls])
            if len(torch.unique(values)) > 1:
                varying.append(name)
    return varying[0] if len(varying) == 1 else None


def timesteps(seen: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps from the whole range, in random order.

    Half of them lie evenly over the range; half as densely as the recorded ones, with each stretch between neighbours
    counting alike, so that a schedule that is shifted towards noise is seen where it goes. Some are the highest
    recorded one, with which every schedule begins.

    Args:
        seen: Recorded timesteps, in the model's own units: up to 1, or to 1000.
        count: How many to draw.
        generator: Places each at random inside its stretch.

    Returns:
        (count,), of the dtype of ``seen``.
    """
    recorded = torch.unique(seen.double())
    end = 1.0 if recorded[-1] <= 1 else max(1000.0, float(recorded[-1]))
    edges = torch.unique(torch.cat([recorded, recorded.new_tensor([0.0, end])]))
    first = round(FIRST_SHARE * count)
    halves = ((count - first) // 2, count - first - (count - first) // 2)

    def spread(number: int) -> Tensor:
        return (torch.arange(number) + torch.rand(number, generator=generator, dtype=torch.float64)) / number

    places = spread(halves[1]) * (len(edges) - 1)
    stretch = places.long().clamp_max(len(edges) - 2)
    between = edges[stretch] + (places - stretch) * (edges[stretch + 1] - edges[stretch])
    drawn = torch.cat([spread(halves[0]) * end, between, recorded[-1].expand(first)])
    return drawn[torch.randperm(count, generator=generator)].to(seen.dtype)


def modulation_layers(transformer: nn.Module, adapter: Adapter) -> dict[Layer, nn.Module]:
    """The modulation layers, in execution order."""
    return {
        (spec.name, index, stream): block.get_submodule(path)
        for spec in adapter.stacks
        for index, block in enumerate(adapter.blocks(transformer, spec))
        for stream, path in spec.of(block).modulation.items()
    }


def sources_of(
    transformer: nn.Module, layers: Mapping[Layer, nn.Module], arguments: dict[str, Any]
) -> dict[Layer, Layer]:
    """For each layer, the one of the very first block that is given the same on a recorded call, if there is one."""
    inputs = _inputs(transformer, layers, arguments)
    entrance = next(iter(layers))[:2]
    sources: dict[Layer, Layer] = {}
    for layer, x in inputs.items():
        alike = (first for first in inputs if first[:2] == entrance and torch.equal(inputs[first], x))
        source = next(alike, None)
        if source is None:
            _warn(*layer)
        else:
            sources[layer] = source
    return sources


class _Seen(Exception):
    """Ends a call once all layers have been given their inputs."""


def _inputs(
    transformer: nn.Module, layers: Mapping[Layer, nn.Module], arguments: dict[str, Any]
) -> dict[Layer, Tensor]:
    """What layers are given in a call, (rows, d) each; nothing that comes after the last of them runs."""
    found: dict[Layer, Tensor] = {}

    def watch(layer: Layer) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[layer] = args[0].flatten(0, -2)
            if len(found) == len(layers):
                raise _Seen

        return hook

    handles = (module.register_forward_pre_hook(watch(layer)) for layer, module in layers.items())
    device = next(weight.device for weight in transformer.parameters() if not weight.is_meta)
    with removing(handles), suppress(_Seen):
        velocity(transformer, to_device(arguments, device))
    return found


@torch.no_grad()
def modulation_inputs(
    transformer: nn.Module, layers: Mapping[Layer, nn.Module], calls: Iterable[dict[str, Any]]
) -> dict[Layer, Tensor]:
    """What layers are given in some calls, (rows, d) each; nothing that comes after the last of them runs."""
    parts: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
    for arguments in calls:
        for layer, x in _inputs(transformer, layers, arguments).items():
            parts[layer].append(x)
    return {layer: torch.cat(found) for layer, found in parts.items()}


def _calls(states: States, batch: int, name: str | None, points: Tensor | None) -> Iterator[dict[str, Any]]:
    """Recorded calls as they are, or with these timesteps put in, states over again until all are used."""
    if name is None or points is None:
        yield from states.batches(batch, min(len(states), ROWS))
        return
    while len(points):
        for arguments in states.batches(batch, min(len(states), len(points))):
            size = batch_size(arguments)
            yield {**arguments, name: points[:size]}
            points = points[size:]
