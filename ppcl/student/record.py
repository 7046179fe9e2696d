"""What a student's config says: counts, smaller modules, and where its blocks come from, over all rounds.

The teacher may be a compressed model itself. Its blocks stand for those of the first teacher, which LoRA, ControlNets
and people name, so the student's record names them too. Modules that a former round made smaller stay so, or get
smaller still; their entries move with their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppcl.common.artifacts import to_jsonable
from ppcl.config.names import PREFIX
from ppcl.modules.compressed import compress_class
from ppcl.modules.parts import SLICED, cuts_of, join
from ppcl.modules.slicing import joined, kept_units, pack_kept
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.stock_width import stock_fields
from ppcl.teacher.block_map import RECORD, UNIFORM, BlockMap, recorded_maps, smaller_modules
from ppcl.teacher.families import Adapter

Part = Mapping[str, Any]
Parts = Mapping[str, Part]  # by path


def register_plan(
    student: Any, adapter: Adapter, plan: CompressionPlan, teacher: Mapping[str, Any] | None = None
) -> None:
    """Write counts, smaller modules and provenance into the student's config, so that diffusers loads it.

    The student stays of its stock class unless a module is smaller than in the first teacher, in a way for which that
    class has no config.

    Args:
        student: Its blocks are those of the plan.
        adapter: Its family.
        plan: The plan.
        teacher: The teacher's config; None where the student's is still that.
    """
    config: Mapping[str, Any] = student.config if teacher is None else teacher
    maps, former = recorded_maps(config), dict(config.get(RECORD) or {})
    before: Parts = smaller_modules(config)
    kept: dict[str, list[Any]] = {}
    starts: dict[str, list[Any]] = {}
    pruning: dict[str, Part] = {}
    for spec in adapter.stacks:
        segments = _with_tail(plan.stacks[spec.name], spec.fixed_tail)
        found = _joined(maps.get(spec.name), segments)
        kept[spec.name] = [list(span) if span[1] > span[0] else span[0] for span in found.spans]
        starts[spec.name] = list(found.starts)
        for position, segment in enumerate(segments):
            start = start_index(segment.first, segment.last, segment.start)
            parts = composed(_below(before, f"{spec.name}.{start}"), segment.width)
            pruning |= {join(spec.name, str(position), path): part for path, part in parts.items()}
    record: dict[str, Any] = {"kept_blocks": kept, "starts": starts, "budget": to_jsonable(plan.budget)}
    if plan.sparsity:
        record["sparsity"] = dict(plan.sparsity)
    if plan.call:
        record["call"] = dict(plan.call)
    if former:
        known = {name: former[name] for name in ("source_model", "budget", "plan_sha256") if name in former}
        record["rounds"] = [*former.get("rounds", ()), known]
    whole = dict((former.get(UNIFORM) or {}).get("fields") or {})  # widths as in the first teacher
    student.register_to_config(**adapter.depth_config(student), **whole)
    narrow = stock_fields(student, adapter, pruning)
    if narrow:
        record[UNIFORM] = {"pruning": pruning, "fields": {name: student.config[name] for name in narrow}}
    elif pruning or type(student).__name__.startswith(PREFIX):
        compress_class(student, pruning)
    student.register_to_config(**narrow, **{RECORD: record})


def composed(before: Parts, after: Parts) -> dict[str, Part]:
    """The smaller modules of a block after another round, by their paths inside it, outer modules first.

    Args:
        before: Those that it had.
        after: Those that were made of what was there then.
    """
    parts = dict(before)
    for path, part in after.items():
        if part["kind"] not in SLICED:  # the whole module is another one, with all that was smaller in it
            parts = {name: old for name, old in parts.items() if not name.startswith(f"{path}.")}
        old = parts.get(path)
        parts[path] = _cut_again(old, part) if old and old["kind"] == part["kind"] in SLICED else dict(part)
    return dict(sorted(parts.items()))


def _cut_again(old: Part, new: Part) -> Part:
    """Units of units: those of the whole module that both cuts keep."""
    again = {cut["kind"]: cut for cut in cuts_of(new)}
    cuts = []
    for cut in cuts_of(old):
        kept = kept_units(cut)
        chosen = [kept[unit] for unit in kept_units(again[cut["kind"]])]
        cuts.append({**cut, "size": len(chosen), "kept": pack_kept(chosen, int(cut["of"]))})
    return joined(cuts)


def _with_tail(segments: Sequence[Segment], tail: int) -> list[Segment]:
    """A stack's segments, and its fixed tail, which keeps its place behind the planned blocks."""
    end = segments[-1].last + 1 if segments else 0
    return [*segments, *(Segment(index, index) for index in range(end, end + tail))]


def _joined(before: BlockMap | None, segments: Sequence[Segment]) -> BlockMap:
    if before is None:
        count = segments[-1].last + 1 if segments else 0
        before = BlockMap(tuple((index, index) for index in range(count)), (None,) * count)
    found = [before.joined(s.first, s.last, s.start) for s in segments]
    return BlockMap(tuple(span for span, _ in found), tuple(start for _, start in found))


def _below(parts: Parts, prefix: str) -> Parts:
    """Entries of one block, by their paths inside it."""
    return {
        f"{name}.".removeprefix(f"{prefix}.").removesuffix("."): part
        for name, part in parts.items()
        if f"{name}.".startswith(f"{prefix}.")
    }
