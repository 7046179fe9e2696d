"""What is smaller inside the blocks of a plan, in words. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppcl.common.tables import counted
from ppcl.modules.parts import cuts_of
from ppcl.student.plan import CompressionPlan

_BESIDE = ("text_output", "unit_gate", "no_output", "identity")  # of two linear maps, which ``text_input`` stands for


def size_words(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """How small modules are, a text for each kind: ``rank 2 to 5``, ``64 to 128 of 256 neurons``."""
    words = []
    cuts = [cut for part in parts for cut in (cuts_of(part) or [part])]
    for kind, before, after in (("low_rank", "rank ", ""), ("heads", "", " heads"), ("narrow", "", " neurons")):
        sizes = sorted({int(part["size"]) for part in cuts if part["kind"] == kind})
        if sizes:
            span_of = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
            whole = sorted({int(part["of"]) for part in cuts if part["kind"] == kind and "of" in part})
            words.append(f"{before}{span_of}{f' of {whole[-1]}' if whole else ''}{after}")
    kinds = {part["kind"] for part in parts}
    words += ["one affine map"] if "linear" in kinds else []
    words += ["two linear maps"] if "text_input" in kinds else []
    return words


def smaller_modules(plan: CompressionPlan) -> list[str]:
    """The smaller modules of a plan, a text for each place and kind: ``img_mod.1: rank 5 to 9 in 24 blocks``.

    What cuts heads and neurons of a block at once, since one layer reads both, stands under ``heads and neurons``.
    """
    parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for segments in plan.stacks.values():
        for segment in segments:
            for path, part in segment.width.items():
                if part["kind"] not in _BESIDE:
                    parts.setdefault((path or "heads and neurons", str(part["kind"])), []).append(part)
    return [
        f"{path}: {', '.join(size_words(same))} in {counted(len(same), 'block')}"
        for (path, _), same in sorted(parts.items(), key=lambda entry: entry[0])
    ]
