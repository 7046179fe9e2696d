"""Depth and width under one budget: which runs become one block, which modules become smaller.

A dynamic programme over block positions. Each piece of a plan (a kept block or a run, with or
without smaller modules) saves something and costs a squared velocity error; squares add. What
was saved so far is kept in about a thousand classes, with the cheapest way to each of them.
No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ppcl.pruning.artifacts import Candidate, WidthOption
from ppcl.student.plan import Segment, start_index
from ppcl.teacher.model_info import ModelInfo, Stack

CLASSES = 1000
Layout = dict[str, tuple[Segment, ...]]


@dataclass(frozen=True)
class Piece:
    """One way to fill blocks first..last."""

    segment: Segment
    saved: float
    cost: float


@dataclass(frozen=True)
class _Cell:
    """The cheapest way found so far to have saved about this much."""

    cost: float
    saved: float
    piece: Piece | None = None
    before: _Cell | None = None
    stack: str = ""


def best_layouts(
    model: ModelInfo,
    runs: Sequence[tuple[Candidate, float]],
    options: Sequence[WidthOption],
    by_flops: bool,
) -> list[tuple[Layout, float]]:
    """Return the cheapest layout for each class of savings.

    Args:
        model: The teacher.
        runs: Allowed runs and their squared errors.
        options: Allowed smaller modules.
        by_flops: Save time instead of parameters: FLOPs of blocks, and what was measured of smaller modules.

    Returns:
        Layouts with their summed squared errors, from nothing saved to as much as possible.
    """
    pieces = pieces_of(model, runs, options, by_flops)
    return fill(model, pieces, by_flops)


def pieces_of(
    model: ModelInfo,
    runs: Sequence[tuple[Candidate, float]],
    options: Sequence[WidthOption],
    by_flops: bool,
) -> dict[str, dict[int, list[Piece]]]:
    """All ways to fill blocks, by stack and first block. The arguments are those of :func:`best_layouts`."""
    return {
        stack.name: _pieces(
            stack,
            [(c, cost) for c, cost in runs if c.stack == stack.name],
            [o for o in options if o.stack == stack.name],
            by_flops,
        )
        for stack in model.stacks
    }


def best_subsets(model: ModelInfo, plan: Layout, by_flops: bool) -> list[tuple[Layout, float]]:
    """Like :func:`best_layouts`, with nothing but the pieces of one plan and the teacher's own blocks.

    Args:
        model: The teacher.
        plan: Segments of each stack; those without a measured error come last.
        by_flops: Save FLOPs instead of parameters.
    """
    pieces: dict[str, dict[int, list[Piece]]] = {}
    for stack in model.stacks:
        sizes = stack.block_flops if by_flops and stack.block_flops else stack.block_params
        found = {i: [Piece(Segment(i, i), 0.0, 0.0)] for i in range(stack.num_blocks)}
        for segment in plan[stack.name]:
            if segment.is_substitute:
                start = start_index(segment.first, segment.last, segment.start)
                saved = sum(sizes[segment.first : segment.last + 1]) - sizes[start]
                saved += segment.saved_speed if by_flops else segment.saved_params
                cost = (1.0 if segment.error is None else segment.error) ** 2
                found[segment.first].append(Piece(segment, saved, cost))
        pieces[stack.name] = found
    return fill(model, pieces, by_flops)


def fill(
    model: ModelInfo, pieces: Mapping[str, Mapping[int, Sequence[Piece]]], by_flops: bool
) -> list[tuple[Layout, float]]:
    """Put pieces together, stack after stack; ``pieces`` are listed by stack and first block."""
    unit = max(1.0, (model.flops if by_flops else model.params) / CLASSES)
    cells = {0: _Cell(0.0, 0.0)}
    for stack in model.stacks:
        cells = _fill(stack, cells, pieces[stack.name], unit)
    order = [stack.name for stack in model.stacks]
    return [(_layout(cells[key], order), cells[key].cost) for key in sorted(cells)]


def _fill(
    stack: Stack, cells: Mapping[int, _Cell], pieces: Mapping[int, Sequence[Piece]], unit: float
) -> dict[int, _Cell]:
    """Go through one stack; ``pieces`` are listed by their first block."""
    rows: list[dict[int, _Cell]] = [dict(cells), *({} for _ in range(stack.num_blocks))]
    for position in range(stack.num_blocks):
        for piece in pieces[position]:
            target = rows[piece.segment.last + 1]
            for cell in rows[position].values():
                cost, saved = cell.cost + piece.cost, cell.saved + piece.saved
                key = int(saved / unit)
                found = target.get(key)
                if found is None or cost < found.cost:
                    target[key] = _Cell(cost, saved, piece, cell, stack.name)
        rows[position] = {}
    return rows[-1]


def _pieces(
    stack: Stack, runs: Sequence[tuple[Candidate, float]], options: Sequence[WidthOption], by_flops: bool
) -> dict[int, list[Piece]]:
    """All ways to fill blocks, by first block; of the ways to fill the same blocks only the undominated ones."""
    by_block: dict[int, list[WidthOption]] = {}
    for option in options:
        by_block.setdefault(option.block, []).append(option)
    sizes = stack.block_flops if by_flops and stack.block_flops else stack.block_params
    found: dict[int, list[Piece]] = {i: [] for i in range(stack.num_blocks)}
    for index in range(stack.num_blocks):
        found[index] += _with_width(Segment(index, index), 0.0, 0.0, by_block.get(index, ()), by_flops)
    for run, cost in runs:
        start = start_index(run.first, run.last, run.start)
        saved = sum(sizes[i] for i in range(run.first, run.last + 1)) - sizes[start]
        # a substitute carries several blocks' work: it keeps its feed-forward networks
        inside = [o for o in by_block.get(start, ()) if o.group.startswith("modulation")]
        whole = Segment(run.first, run.last, run.start or "middle")
        found[run.first] += _with_width(whole, saved, cost, inside, by_flops)
    return found


def _with_width(
    segment: Segment, saved: float, cost: float, options: Sequence[WidthOption], by_flops: bool
) -> list[Piece]:
    """A segment with every undominated choice of at most one option a group."""
    pieces = []
    for chosen in _choices(options, by_flops):
        params, flops = sum(o.saved_params for o in chosen), sum(o.saved_flops for o in chosen)
        speed = sum(o.saved_speed for o in chosen)
        time = speed if any(o.saved_time is not None for o in chosen) else None
        parts = {path: dict(part) for option in chosen for path, part in option.parts.items()}
        total = cost + sum(o.error**2 for o in chosen)
        error = math.sqrt(total) if total else None
        made = Segment(segment.first, segment.last, segment.start, parts, params, flops, error, time)
        pieces.append(Piece(made, saved + (speed if by_flops else params), total))
    return pieces


Choice = tuple[WidthOption, ...]


def _choices(options: Sequence[WidthOption], by_flops: bool) -> list[Choice]:
    """Undominated choices of at most one option a group, no two of which replace the same module.

    Savings and costs add, so groups are merged one after another and what is dominated on the way stays so. Only
    the text stream replaces modules that belong to other groups: it is taken, or they are.
    """
    text = [o for o in options if o.group == "text"]
    rest = [o for o in options if o.group != "text"]
    found = _merge(((),), rest, by_flops)
    for option in text:
        found += _merge(((option,),), [o for o in rest if not _overlap(o.parts, option.parts)], by_flops)
    return _undominated(found, by_flops)


def _merge(base: Sequence[Choice], options: Sequence[WidthOption], by_flops: bool) -> list[Choice]:
    groups: dict[str, list[WidthOption]] = {}
    for option in options:
        groups.setdefault(option.group, []).append(option)
    found = list(base)
    for members in groups.values():
        found = _undominated([*found, *((*chosen, o) for chosen in found for o in members)], by_flops)
    return found


def _undominated(choices: Sequence[Choice], by_flops: bool) -> list[Choice]:
    """Those that no other beats in both saving and cost, from the largest saving on."""

    def rank(chosen: Choice) -> tuple[float, float]:
        return -sum(o.saved_speed if by_flops else o.saved_params for o in chosen), sum(o.error**2 for o in chosen)

    best, kept = math.inf, []
    for chosen in sorted(choices, key=rank):
        if rank(chosen)[1] < best:
            best = rank(chosen)[1]
            kept.append(chosen)
    return kept


def _overlap(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether a module of one is, or lies in, a module of the other."""
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in one for b in other)


def _layout(cell: _Cell, order: Sequence[str]) -> Layout:
    pieces: dict[str, list[Segment]] = {name: [] for name in order}
    at: _Cell | None = cell
    while at is not None and at.piece is not None:
        pieces[at.stack].append(at.piece.segment)
        at = at.before
    return {name: tuple(reversed(segments)) for name, segments in pieces.items()}
