"""Allocations: how much of a budget each class of modules gives, before anything is known of single errors.

Classes are the groups of width options (image networks, text networks, attentions). An allocation is a function from
classes and an amount to a share for each class, and an entry in ``ALLOCATIONS``; ``plan.allocation`` names it for
``plan.mode=allocation``, which cuts that share of every module of the class; ``FILE.py:function`` is one of yours. No
torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ppcl.config.extensions import ALLOCATIONS
from ppcl.errors import BudgetError, ConfigError
from ppcl.modules.parts import cuts_of
from ppcl.pruning.artifacts import WidthOption
from ppcl.pruning.knapsack import Layout, Vectors, put_in
from ppcl.student.plan import Segment
from ppcl.teacher.model_info import ModelInfo

STEPS = 200  # amounts tried, from nothing to all that can go


@dataclass(frozen=True)
class Class:
    """What an allocation knows of a class of modules.

    Attributes:
        size: Parameters of its modules.
        cap: Share of them that can go, 0 to 1.
        weight: gamma > 0, how hard it is cut beside the others.
    """

    size: float
    cap: float = 1.0
    weight: float = 1.0


def uniform(classes: Mapping[str, Class], amount: float) -> dict[str, float]:
    """The same share of every class, as far as its cap lets it. See :func:`nirvana`."""
    return nirvana({name: Class(c.size, c.cap) for name, c in classes.items()}, amount)


def nirvana(classes: Mapping[str, Class], amount: float) -> dict[str, float]:
    """Shares in the ratio of gamma (NIRVANA, arXiv 2509.14230): f = amount / sum gamma_k P_k, min(gamma_k f, cap_k).

    What the caps leave over is spread over the other classes by the same rule, until the amount is met.

    Args:
        classes: By name.
        amount: Parameters that must go.

    Returns:
        Share of each class, 0 to its cap; the sum of share times size is the amount.

    Raises:
        BudgetError: All caps together do not give that much.
    """
    most = sum(c.cap * c.size for c in classes.values())
    if amount > most * (1 + 1e-9):
        raise BudgetError(f"{amount:g} parameters cannot go; the classes can give {most:g} at most: ask for less")
    shares = dict.fromkeys(classes, 0.0)
    free = {name: c for name, c in classes.items() if c.size > 0 and c.cap > 0}
    left = amount
    while free:
        base = left / sum(c.weight * c.size for c in free.values())
        full = {name: c for name, c in free.items() if c.weight * base >= c.cap}
        for name, c in (full or free).items():
            shares[name] = c.cap if full else c.weight * base
            left -= shares[name] * c.size
        free = {name: c for name, c in free.items() if name not in full} if full else {}
    return shares


def shares_by(name: str, classes: Mapping[str, Class], amount: float) -> dict[str, float]:
    """Spread an amount by an allocation's name, and check what comes out.

    Args:
        name: Of ``ALLOCATIONS``, or ``file.py:function`` or ``module:function``.
        classes: By name.
        amount: Parameters that must go.

    Returns:
        Share of each class, 0 to its cap.

    Raises:
        ConfigError: The allocation cannot be loaded, or gives something else.
    """
    shares = ALLOCATIONS.named(name)(classes, amount)
    if not isinstance(shares, Mapping) or set(shares) != set(classes):
        raise ConfigError(f"plan.allocation={name}: got {shares!r}, expected a share for each of {', '.join(classes)}")
    for group, share in shares.items():
        if not -1e-9 <= share <= classes[group].cap + 1e-9:  # NaN is none, either
            raise ConfigError(
                f"plan.allocation={name}: got a share of {share!r} of {group}, expected 0 to {classes[group].cap:.3g}"
            )
    return dict(shares)


def uniform_counts(sizes: Sequence[int], importance: Sequence[float], share: float, slack: float) -> list[int]:
    """The same share of every block stays. See :func:`ecoflap_counts`."""
    return _whole([(1 - share) * size for size in sizes], sizes, round((1 - share) * sum(sizes)))


def ecoflap_counts(sizes: Sequence[int], importance: Sequence[float], share: float, slack: float) -> list[int]:
    """Weights that stay in each block, by importance (ECoFLaP, arXiv 2310.02998).

    Every block keeps 1 - p_max of its weights, p_max = share + slack; what else stays is spread in the ratio of the
    importances, and what a block is too small for goes to the others (the public code adds that excess once more
    where it should take it away).

    Args:
        sizes: Weights of each block.
        importance: Of each block, at least 0 (:func:`ppcl.pruning.criteria.zeroth_order.gradient_norm`).
        share: Of all weights, that goes.
        slack: A block may lose so much more than the share.

    Returns:
        Whole numbers from 0 to the block's size that add up to (1 - share) of all weights, rounded.

    Raises:
        BudgetError: An importance is NaN, infinite or below 0.
    """
    if not all(math.isfinite(value) and value >= 0 for value in importance):
        raise BudgetError("importances of blocks must be finite and at least 0; lower sparsity.epsilon")
    total = round((1 - share) * sum(sizes))
    floors = [max(0.0, 1 - share - slack) * size for size in sizes]
    least = max(importance, default=0.0) * 1e-9 or 1.0  # a block of no importance takes what nobody else can
    classes = {
        str(i): Class(1.0, size - floor, max(value, least))
        for i, (size, floor, value) in enumerate(zip(sizes, floors, importance, strict=True))
    }
    extra = nirvana(classes, max(0.0, total - sum(floors)))
    return _whole([floor + extra[str(i)] for i, floor in enumerate(floors)], sizes, total)


def _whole(counts: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Round to whole numbers that add up: those with the largest remainders are rounded up."""
    rounded = [min(size, int(count + 1e-9)) for count, size in zip(counts, sizes, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (rounded[i] - counts[i], i))
    for i in (i for _ in range(2) for i in order if rounded[i] < sizes[i]):
        if sum(rounded) == total:
            break
        rounded[i] += 1
    return rounded


# how many weights of each block stay, for sparsity.allocation
COUNTS: dict[str, Callable[[Sequence[int], Sequence[float], float, float], list[int]]] = {
    "uniform": uniform_counts,
    "ecoflap": ecoflap_counts,
}


@dataclass(frozen=True)
class _Module:
    """A module that can lose units: its size in parameters and its options, from the smallest cut on."""

    group: str
    size: float
    options: tuple[WidthOption, ...]


def allotted_layouts(
    model: ModelInfo, options: Sequence[WidthOption], allocation: str, gamma: float
) -> list[list[WidthOption]]:
    """Cut the share that an allocation gives each class from all modules of the class, for growing amounts.

    Only so many sizes of a module were measured. What rounding to one of them leaves is carried over to the class's
    next module, so that the class gives its share to within one step of one module.

    Args:
        model: The teacher, for the order of stacks.
        options: What was measured; fewer neurons and fewer heads count, other kinds have no share.
        allocation: See :func:`shares_by`.
        gamma: How much harder neurons are cut than heads (``nirvana``).

    Returns:
        Options to put in, from none to as many as possible; empty if nothing can lose units.
    """
    modules = _modules(model, options)
    by_class: dict[str, list[_Module]] = {}
    for module in modules:
        by_class.setdefault(module.group, []).append(module)
    classes = {
        group: Class(
            size=sum(m.size for m in members),
            cap=sum(m.options[-1].saved_params for m in members) / sum(m.size for m in members),
            weight=gamma if members[0].options[0].family == "ffn" else 1.0,
        )
        for group, members in by_class.items()
    }
    most = sum(c.cap * c.size for c in classes.values())
    ladder: list[list[WidthOption]] = []
    for step in range(STEPS + 1) if modules else ():
        shares = shares_by(allocation, classes, most * step / STEPS)
        choice = [option for group, members in by_class.items() for option in _cut(members, shares[group])]
        if not ladder or choice != ladder[-1]:
            ladder.append(choice)
    return ladder


def _cut(members: Sequence[_Module], share: float) -> list[WidthOption]:
    """For each module the size nearest to what is due; the remainder is due at the next one."""
    due, cuts = 0.0, []
    for module in members:
        due += share * module.size
        best = min((None, *module.options), key=lambda o: abs(due - (o.saved_params if o else 0)))
        if best is not None:
            cuts.append(best)
            due -= best.saved_params
    return cuts


def _modules(model: ModelInfo, options: Sequence[WidthOption]) -> list[_Module]:
    """Modules that can lose units, in the order of the blocks."""
    by_module: dict[tuple[int, int, str], list[WidthOption]] = {}
    order = {stack.name: number for number, stack in enumerate(model.stacks)}
    for option in options:
        cuts = [cut for part in option.parts.values() for cut in cuts_of(part)]
        if cuts and len(cuts) >= len(option.parts) and all(cut["size"] < cut["of"] for cut in cuts):
            by_module.setdefault((order[option.stack], option.block, option.group), []).append(option)
    modules = []
    for (_, _, group), members in sorted(by_module.items()):
        sizes = sorted(members, key=lambda o: o.saved_params)
        part = cuts_of(next(iter(sizes[-1].parts.values())))[0]
        whole = sizes[-1].saved_params * part["of"] / (part["of"] - part["size"])
        modules.append(_Module(group, whole, tuple(sizes)))
    return modules


def layout_of(model: ModelInfo, options: Sequence[WidthOption], vectors: Vectors) -> Layout:
    """The segments that put options, of which vectors are known by name, into the teacher's own blocks."""
    inside: dict[tuple[str, int], list[WidthOption]] = {}
    for option in options:
        inside.setdefault((option.stack, option.block), []).append(option)
    return {
        stack.name: tuple(
            put_in(Segment(index, index), None, tuple(inside.get((stack.name, index), ())), vectors)[0]
            for index in range(stack.num_blocks)
        )
        for stack in model.stacks
    }
