"""Which calibration states to score with: the best of several draws (NIRVANA, arXiv 2509.14230).

The paper draws N calibration sets and keeps the one whose pruned model is nearest to the dense one by KL divergence;
a diffusion transformer has no distribution over tokens, so here nearest is by velocity error on held-out states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.states import States
from ppcl.common.progress import announce
from ppcl.common.streams import Stream, step_generator
from ppcl.modules.slicing import matrix_of, scaled
from ppcl.pruning.criteria.base import Batches, Site, Sites, hooked
from ppcl.teacher.call_arguments import batch_size, to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter
from ppcl.teacher.velocity import VelocityErrors


def draw_states(train: States, draws: int, size: int, states: int, seed: int) -> list[Batches]:
    """Draw calibration sets.

    Args:
        train: The states to draw from.
        draws: How many sets; the first is spread over the states, the others are drawn at random.
        size: Most states of a batch.
        states: Of each set (all there are, if fewer).
        seed: Fixes them.
    """
    sets: list[Batches] = [list(train.batches(size, states))]
    count = sum(batch_size(batch) for batch in sets[0])
    for draw in range(1, draws):
        generator = step_generator(seed, draw, Stream.CALIBRATION_SETS)
        rows = [row for at in range(0, count, size) for row in train.draw(min(size, count - at), generator)]
        sets.append([call.arguments for call, _ in train.weighed(rows, size)])
    return sets


@torch.no_grad()
def cut_error(
    transformer: nn.Module, adapter: Adapter, sites: Sites, scores: Sequence[Tensor], share: float, held_out: Batches
) -> float:
    """Relative velocity error with all sites cut at once and nothing made up for.

    Args:
        transformer: The teacher's transformer; it is left as it is.
        adapter: Its family.
        sites: What loses units.
        scores: (units,) of each site; the best stay.
        share: Of the units, that stays.
        held_out: States that the scores do not come from.

    Returns:
        sqrt(sum ||v_cut - v||^2 / sum ||v||^2).
    """
    masks = []
    for site, score in zip(sites, scores, strict=True):
        order = torch.argsort(score, descending=True, stable=True)
        mask = torch.zeros(site.units.count)
        mask[order[: max(1, round(share * site.units.count))]] = 1
        masks.append(mask)

    def watch(number: int, site: Site, layer: nn.Linear) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            mask = masks[number].to(device=args[0].device, dtype=args[0].dtype)
            factors = site.spread(mask, matrix_of(layer).shape[1])
            return (scaled(layer, args[0], factors), *args[1:])

        return hook

    errors = VelocityErrors()
    device = next(transformer.parameters()).device
    for arguments in held_out:
        moved = to_device(arguments, device)
        target = velocity(transformer, moved)
        with hooked(transformer, adapter, sites, watch):
            errors.add(target, velocity(transformer, moved))
    return errors.relative


def best_draw(
    score: Callable[[Batches], list[Tensor]], error: Callable[[list[Tensor]], float], sets: Sequence[Batches]
) -> list[Tensor]:
    """Scores from the calibration set of least error; of one set no error is asked for.

    Args:
        score: From states to the scores of all sites.
        error: Of scores, e.g. :func:`cut_error`; a NaN is worse than any number.
        sets: Calibration sets.
    """
    if len(sets) == 1:
        return score(sets[0])
    tried = []
    for number, batches in enumerate(sets):
        scores = score(batches)
        value = error(scores)
        announce(f"calibration draw {number + 1} of {len(sets)}: velocity error {value:.4f}")
        tried.append((math.inf if math.isnan(value) else value, number, scores))
    return min(tried, key=lambda draw: draw[:2])[2]
