"""How far does the teacher's velocity move when one part of it is replaced? Prices to first order, and exact costs.

Prices come from one backward sweep (:mod:`ppcl.analysis.backward`): what replaces a run changes the states that leave
it by delta, and the velocity by a vector whose products with K random sign vectors r are <g, delta>. Their mean square
estimates the squared error, and the products of several options add up where errors are small.

Exact costs carry the changed states of every replacement through all later blocks, all of them in one forward sweep.
Their products are those of what the velocity really moved by with the same r, so that they add up with prices, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.backward import signs_of
from ppcl.analysis.entries import Arguments, Entries, enter, leave
from ppcl.analysis.findings import Findings
from ppcl.analysis.sweep import Batch, Course, Seen, velocities
from ppcl.capture.store import StateStore
from ppcl.common.devices import autocast
from ppcl.common.files import remove
from ppcl.common.progress import Progress
from ppcl.student.assembly import RunKey
from ppcl.teacher.blocks import Place
from ppcl.teacher.families import StackSpec, States
from ppcl.teacher.velocity import VelocityErrors

BRANCHES = 8e9  # bytes of changed states that wait between two blocks
CARRIED = 256  # random vectors for what is carried, which they cost no pass
AT_ONCE = 32  # of them in float
KIND = "prices"  # of findings


@dataclass(frozen=True)
class Job:
    """A replacement.

    Attributes:
        run: (stack, first, last) of the blocks that are replaced.
        make: Makes what stands for them, with the blocks' contract, from the teacher's block at the run's end, whose
            weights it may share.
        note: What is to be known of it later; goes to JSON.
    """

    run: RunKey
    make: Callable[[nn.Module], nn.Module]
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> Place:
        """The last block of the run."""
        return self.run[0], self.run[2]


Jobs = Mapping[str, Job]  # by names of any kind


class Prices:
    """A consumer of the backward sweep: the products of every replacement with the gradients at its run's end.

    Args:
        course: The sweep's, with all levels of the states in its store.
        jobs_at: The replacements whose run ends at a block, given that block; asked for when its turn comes.
        findings: Receives the products of each block.
        progress: Counts blocks.
    """

    def __init__(
        self,
        course: Course,
        jobs_at: Callable[[Place, nn.Module], Jobs],
        findings: Findings,
        progress: Progress | None = None,
    ) -> None:
        self.course, self.jobs_at, self.findings, self.progress = course, jobs_at, findings, progress
        self.place: Place = ("", 0)
        self.jobs: Jobs = {}
        self.modules: dict[str, nn.Module] = {}
        self.products: dict[str, list[Tensor]] = {}
        self.entries: Entries | None = None

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Make the replacements that end here."""
        self.place = (stack.name, index)
        self.jobs = self.jobs_at(self.place, block)
        self.modules = {name: job.make(block) for name, job in self.jobs.items()}
        self.products = {name: [] for name in self.jobs}
        return ()

    def see(self, seen: Seen) -> None:
        """Run every replacement on what enters its run."""
        spec, source = seen.call.stack, self.course.source
        for name, module in self.modules.items():
            states, others, first = seen.call.inputs, seen.call.arguments, self.jobs[name].run[1]
            if first != seen.call.index:
                position = source.order.index((spec.name, first))
                self.entries = self.course.entries(position, self.entries)
                states, others = self.course.inputs(self.entries, seen.batch, position)
            with autocast(source.device, self.course.precision):
                changed = source.adapter.call(spec, module, states, others)
            self.products[name].append(products_with(seen.gradients, changed, seen.call.outputs).cpu())

    def finish(self) -> None:
        """Write the products of all processes' states."""
        every = {name: _of_all(self.course, torch.cat(parts, 1)) for name, parts in self.products.items() if parts}
        self.modules = {}
        if self.course.group.is_main:
            notes = {name: {"run": self.jobs[name].run, **self.jobs[name].note} for name in self.jobs}
            self.findings.write(KIND, self.place, every, notes)
        if self.progress:
            self.progress.advance()


def _of_all(course: Course, products: Tensor) -> Tensor:
    """Put products with the states of all processes in the order of the batches, (..., K, N)."""
    if course.group.size == 1:
        return products.cpu()
    starts, total = {}, 0
    for batch in course.batches:
        starts[batch.number], total = total, total + len(batch.rows)
    every = torch.zeros(*products.shape[:-1], total, device=course.source.device)
    parts = torch.split(products.to(every), [len(batch.rows) for batch in course.own], -1)
    for batch, part in zip(course.own, parts, strict=True):
        every[..., starts[batch.number] : starts[batch.number] + len(batch.rows)] = part
    course.group.sum_tensors([every])
    return every.cpu()


def products_with(gradients: Mapping[str, Tensor], changed: States, after: States) -> Tensor:
    """<g, changed - after> of each of K vectors and B states, (K, B).

    Args:
        gradients: (K, B, tokens, features) by stream.
        changed: States that leave a replacement, (B, tokens, features).
        after: Those that leave what it replaces.
    """
    total: Tensor | None = None
    for stream, gradient in gradients.items():
        here, there = changed.get(stream), after.get(stream)
        if here is not None and there is not None:
            part = torch.einsum("kbtf,btf->kb", gradient.float(), here.float() - there.float())
            total = part if total is None else total + part
    if total is None:
        raise AssertionError("a block changes no stream that the velocity depends on")
    return total


@dataclass(frozen=True)
class Price:
    """What a replacement costs, to first order or exactly.

    Attributes:
        note: Of its job, and its ``run``.
        vector: (K, N), products with K vectors of N states, divided by the teacher's velocity and sqrt(K): the norm
            estimates the error, and the norm of a sum of vectors that of several replacements together.
        exact: The error where it was measured, else None.
    """

    note: Mapping[str, Any]
    vector: Tensor
    exact: float | None = None

    @property
    def error(self) -> float:
        """Relative velocity error."""
        return float(self.vector.norm()) if self.exact is None else self.exact


def _scaled(products: Tensor, norm: float) -> Tensor:
    """Vectors from products with K random vectors, (..., K, N)."""
    return products.double() / (norm * math.sqrt(products.shape[-2]))


def read_prices(findings: Findings, places: Sequence[Place], norm: float) -> dict[str, Price]:
    """What a backward sweep with :class:`Prices` found.

    Args:
        findings: See there.
        places: Of the blocks, in the order of the result.
        norm: Of the teacher's velocity over all the states.
    """
    prices: dict[str, Price] = {}
    for place in places:
        notes: Mapping[str, Any] = findings.numbers(KIND, place)
        names = list(findings.shapes(KIND, place))
        for name, products in zip(names, findings.tensors(KIND, place, *names), strict=True):
            prices[name] = Price(notes[name], _scaled(products, norm))
    return prices


def velocity_norm(course: Course) -> float:
    """The norm of the teacher's velocity over all states of a swept course, of all processes."""
    squares = sum(float(answer.double().pow(2).sum()) for _, answer in velocities(course))
    return float(course.group.sum_scalars({"": squares})[""] ** 0.5)


@torch.no_grad()
def exact_costs(
    course: Course,
    jobs: Jobs,
    folder: Path,
    label: str,
    vectors: int = 4,
    seed: int = 0,
    limit: float = BRANCHES,
) -> dict[str, Price]:
    """What each replacement alone does to the velocity.

    Args:
        course: After a forward sweep, with all levels of the states in its store.
        jobs: The replacements.
        folder: Receives changed states that do not fit into memory; it is removed.
        label: Name shown beside the progress bar.
        vectors: K, random vectors a state, those of the backward sweep with the same seed.
        seed: Fixes them.
        limit: Bytes of changed states between two blocks; where that is exceeded there are several sweeps.

    Returns:
        Of each job the error sqrt(sum ||v - v_teacher||^2 / sum ||v_teacher||^2) and the vector.
    """
    order = course.source.order
    names = sorted(jobs, key=lambda name: order.index(jobs[name].end))
    sizes = [sum(state.nbytes for state in course.read(0, batch).values()) for batch in course.own]
    size = max(1, int(limit // max(1, sum(sizes))))
    costs: dict[str, Price] = {}
    pieces = [names[start : start + size] for start in range(0, len(names), size)]
    steps = sum(len(order) - order.index(jobs[piece[0]].end) for piece in pieces)
    with Progress(label, total=steps) as progress:
        for piece in pieces:
            remove(folder)
            store = StateStore(folder, "", group=course.group)
            branches = _Branches(course, {name: jobs[name] for name in piece}, store)
            costs |= branches.costs(progress, vectors, seed)
            store.close()
    return {name: costs[name] for name in jobs}


class _Branches:
    """The states that follow from several replacements, each alone, on their way to the velocity."""

    def __init__(self, course: Course, jobs: Jobs, store: StateStore) -> None:
        self.course, self.jobs = course, list(jobs.values())
        self.names = list(jobs)
        count = len(course.batches)
        self.batches = {
            (number, batch.number): Batch(number * count + batch.number, batch.split, 0, batch.load, batch.rows)
            for number in range(len(jobs))
            for batch in course.batches
        }
        self.own = Course(course.source, list(self.batches.values()), store, course.group, course.precision)
        self.entries: Entries | None = None

    def costs(self, progress: Progress, vectors: int, seed: int) -> dict[str, Price]:
        """Sweep from the first replacement to the end."""
        source = self.course.source
        ends = [source.order.index(job.end) for job in self.jobs]
        with closing(source.walk(source.order[min(ends) :])) as blocks:
            for position, block in enumerate(blocks, min(ends)):
                made = {n: self.jobs[n].make(block) for n, end in enumerate(ends) if end == position}
                for batch in self.course.own:
                    others = self._others(position, batch)
                    for number, end in enumerate(ends):
                        if end == position:
                            self._begin(position, batch, number, made[number])
                        elif end < position:
                            self._carry(position, block, batch, number, others)
                self.own.store.commit(position)
                progress.advance()
        return self._at_the_end(vectors, seed)

    def _others(self, position: int, batch: Batch) -> Arguments:
        """What a block is called with beside the states."""
        self.entries = self.course.entries(position, self.entries)
        known = self.entries.known(batch.number, self.course.source.order[position][1])
        return self.course.inputs(self.entries, batch, position)[1] if known is None else known

    def _begin(self, position: int, batch: Batch, number: int, replacement: nn.Module) -> None:
        """Begin a branch of a batch: its replacement on what enters its run."""
        first = self.course.source.order.index(self.jobs[number].run[:2])
        self.entries = self.course.entries(first, self.entries)
        states, others = self.course.inputs(self.entries, batch, first)
        self._run(position, replacement, self.batches[number, batch.number], states, others)

    def _carry(self, position: int, block: nn.Module, batch: Batch, number: int, others: Arguments) -> None:
        """Carry a branch of a batch through a block of the teacher."""
        source, branch = self.course.source, self.batches[number, batch.number]
        stack, index = source.order[position]
        if index:
            states = self.own.read(position - 1, branch)
        else:
            before = self.own.before(branch, stack)
            entry = enter(source, source.stacks[stack], batch.load().arguments, before, self.course.precision)
            states, others = entry.states, entry.arguments[0]
        self._run(position, block, branch, states, others)

    def _run(self, position: int, block: nn.Module, branch: Batch, states: States, others: Arguments) -> None:
        source = self.course.source
        with autocast(source.device, self.course.precision):
            outputs = source.adapter.call(source.stacks[source.order[position][0]], block, states, others)
        self.own.write(position, branch, outputs, {})

    def _at_the_end(self, vectors: int, seed: int) -> dict[str, Price]:
        """The errors of the velocity, and their products with random vectors."""
        errors = [VelocityErrors() for _ in self.jobs]
        products: list[Tensor] = []
        for batch, target in velocities(self.course):
            arguments, moved = batch.load().arguments, []
            for number, error in enumerate(errors):
                states = self.own.before(self.batches[number, batch.number], None) or {}
                velocity = leave(self.course.source, arguments, states, self.course.precision)
                error.add(target, velocity)
                moved.append((velocity.float() - target.float()).flatten(1))
            for row, changes in enumerate(torch.stack(moved, 1)):  # a state's: (jobs, numbers)
                signs = signs_of(batch.first + row, target.shape[1:], vectors, seed).flatten(1)
                parts = torch.split(signs, AT_ONCE)
                products.append(torch.cat([part.to(changes) @ changes.T for part in parts]))  # (K, jobs)
        sums = {f"{n} {k}": v for n, e in enumerate(errors) for k, v in (("d", e.difference), ("t", e.total))}
        sums = self.course.group.sum_scalars(sums)
        every = _of_all(self.course, torch.stack(products, -1).transpose(0, 1))
        return {
            name: Price(
                self.jobs[n].note, _scaled(every[n], sums[f"{n} t"] ** 0.5), (sums[f"{n} d"] / sums[f"{n} t"]) ** 0.5
            )
            for n, name in enumerate(self.names)
        }
