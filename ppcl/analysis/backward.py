"""The backward sweep: how the velocity answers to the states between blocks, block by block.

    g_0 <- [T_1] <- g_1 <- [T_2] <- ... <- g_M <- random r,        g_v = d<r, velocity> / d h_v

Each r is +1 or -1 at every number of the velocity, so that E<r, a>^2 = ||a||^2: an option that changes a block's output
by delta moves the velocity by a vector whose products with the r are <g_v, delta>, to first order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from ppcl.analysis.entries import Entries, enter, leave
from ppcl.analysis.sweep import Batch, Consumer, Course, Visit
from ppcl.capture.store import StateStore
from ppcl.common.streams import Stream, step_generator
from ppcl.teacher.families import States


def signs_of(state: int, shape: Sequence[int], vectors: int, seed: int) -> Tensor:
    """K random vectors of +1 and -1, (K, *shape) of int8; of more vectors the first ones stay the same.

    Args:
        state: Number of the state that they are for.
        shape: Of its velocity.
        vectors: K.
        seed: Fixes them.
    """
    numbers, generator = math.prod(shape), step_generator(seed, state, Stream.PRICE_SIGNS)
    drawn = torch.randint(256, (vectors, -(-numbers // 8)), dtype=torch.uint8, generator=generator)
    bits = torch.from_numpy(np.unpackbits(drawn.numpy(), axis=1, count=numbers))
    return bits.to(torch.int8).mul_(2).sub_(1).reshape(vectors, *shape)


def random_signs(batch: Batch, velocity: Tensor, vectors: int, seed: int) -> Tensor:
    """:func:`signs_of` all states of a batch, (K, *velocity's shape)."""
    states = range(batch.first, batch.first + len(velocity))
    return torch.stack([signs_of(state, velocity.shape[1:], vectors, seed) for state in states], 1).to(velocity.device)


def backward_sweep(
    course: Course, gradients: StateStore, consumers: Sequence[Consumer], vectors: int = 4, seed: int = 0
) -> None:
    """Carry gradients from the velocity back to the first block; consumers see them where they stand.

    Args:
        course: What a forward sweep ran through, with ALL levels held in its store.
        gradients: Receives the gradients between blocks; level i is of what leaves block i, level -1 of what
            enters the first.
        consumers: Whoever wants to know something; they see a block's call with the gradients at its outputs.
        vectors: K, random vectors a state.
        seed: Fixes them.
    """
    source = course.source
    last = len(source.order) - 1
    done = gradients.resume([batch.number for batch in course.own])
    if done is None:
        for batch in course.own:
            gradients.write(last, batch.number, _at_the_end(course, batch, vectors, seed))
        gradients.commit(last)
        done = last
    entries: Entries | None = None
    with closing(source.walk(source.order[: done + 1][::-1])) as blocks:
        for position, block in zip(range(done, -1, -1), blocks, strict=True):
            entries = course.entries(position, entries)
            visit = Visit(course, position, block, consumers)
            for batch in course.own:
                below = _back(course, entries, visit, batch, gradients.read(position, batch.number, source.device))
                gradients.write(position - 1, batch.number, below)
            visit.finish()
            gradients.commit(position - 1)


def _back(
    course: Course, entries: Entries, visit: Visit, batch: Batch, above: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The gradients at what leaves the block before, from those at what leaves a block, which consumers see."""
    with torch.no_grad():
        states, others = course.inputs(entries, batch, visit.position)
    states = _leaves(states)
    with torch.enable_grad():
        outputs, _ = visit.run(batch, states, others, {}, above)
    below = products(states, outputs, above)
    if visit.index or not visit.position:
        return below
    before = _leaves(course.before(batch, visit.stack.name) or {})  # through what lies between two stacks
    with torch.enable_grad():
        entry = enter(course.source, visit.stack, batch.load().arguments, before, course.precision)
    return products(before, entry.states, below)


def products(inputs: States, outputs: States, above: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vector-Jacobian products: K gradients at the outputs become K gradients at the inputs.

    Args:
        inputs: States that need gradients.
        outputs: What was computed from them.
        above: Gradients at the outputs, (K, B, tokens, features) each.
    """
    ends = [stream for stream, state in outputs.items() if state is not None and state.requires_grad]
    count = len(next(iter(above.values())))
    rows = [
        torch.autograd.grad(
            [outputs[stream] for stream in ends],
            list(inputs.values()),
            [above[stream][k] for stream in ends],
            retain_graph=k < count - 1,
            allow_unused=True,
            materialize_grads=True,
        )
        for k in range(count)
    ]
    return {stream: torch.stack(parts) for stream, parts in zip(inputs, zip(*rows, strict=True), strict=True)}


def _leaves(states: States) -> States:
    return {stream: state.detach().requires_grad_() for stream, state in states.items()}


def _at_the_end(course: Course, batch: Batch, vectors: int, seed: int) -> dict[str, Tensor]:
    """The gradients at what leaves the last block, through the transformer's own tail."""
    call = batch.load()
    states = _leaves(course.before(batch, None) or {})
    with torch.enable_grad():
        velocity = leave(course.source, call.arguments, states, course.precision)
    signs = random_signs(batch, velocity, vectors, seed)
    return products(states, {"velocity": velocity}, {"velocity": signs.to(velocity)})
