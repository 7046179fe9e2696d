"""What describes a smaller module: its kind, its size, and what else the kind needs. No torch.

Descriptions come from plans and from the configs of exported pipelines. What is checked here needs no model; whether a
description suits the module that it names is asked when that is replaced (:mod:`ppcl.modules.replacements`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ppcl.errors import ModelError

FAMILIES = {"narrow": "ffn", "heads": "attention"}  # what is cut, as settings name it
CUTS = tuple(FAMILIES)
SLICED = (*CUTS, "parallel")
TEXT_KINDS = ("text_input", "text_output", "unit_gate", "no_output", "identity")
KINDS = ("low_rank", "linear", *SLICED, *TEXT_KINDS)
MOST_UNITS = 1 << 20  # neurons of a layer, and the rank of one


def check_part(part: Any) -> None:
    """Refuse what describes no smaller module.

    Args:
        part: As a plan or a config has it.

    Raises:
        ModelError: A kind that is not known, a size that no module has, or units that are not as many as it says.
    """
    kind = part.get("kind") if isinstance(part, Mapping) else None
    if kind not in KINDS:
        raise ModelError(f"a module cannot be replaced by {str(kind or part)[:100]!r}; known kinds: {', '.join(KINDS)}")
    _check_count(part, "size", 1 if kind in ("low_rank", *SLICED) else 0, MOST_UNITS)
    if kind == "parallel":
        cuts = part.get("cuts")
        kinds = [cut.get("kind") if isinstance(cut, Mapping) else None for cut in cuts] if _is_list(cuts) else []
        if not kinds or not set(kinds) <= set(CUTS) or len(set(kinds)) < len(kinds):
            raise ModelError(f"a replacement 'parallel' has cuts {str(cuts)[:50]!r}, expected heads and neurons")
        for cut in part["cuts"]:
            check_part(cut)
        if sum(cut["size"] for cut in part["cuts"]) != part["size"]:
            raise ModelError("a replacement 'parallel' has not the size of its cuts; its config is damaged")
    elif kind in CUTS:
        _check_cut(part)


def _check_cut(part: Mapping[str, Any]) -> None:
    kind = part["kind"]
    _check_count(part, "of", part["size"], MOST_UNITS)
    kept, count = part.get("kept"), part["of"]
    if not (isinstance(kept, str) and re.fullmatch(r"[0-9a-f]+", kept) and len(kept) <= -(-count // 4)):
        raise ModelError(f"a replacement '{kind}' says in {str(kept)[:50]!r} which of {count} units it keeps")
    mask = int(kept, 16)
    if mask.bit_count() != part["size"] or mask >> count:
        raise ModelError(
            f"a replacement '{kind}' of size {part['size']} keeps {mask.bit_count()} units of {count}; "
            "its config is damaged: export it again"
        )
    for side in ("rows", "columns", "between"):
        names = part.get(side, [] if side == "between" else None)
        if not (_is_list(names) and all(isinstance(name, str) and name for name in names)):
            raise ModelError(f"a replacement '{kind}' has {side} {str(names)[:50]!r}, expected names of linear layers")
    spans = part.get("spans", {})
    if not isinstance(spans, Mapping) or not all(map(_is_spans, spans.values())):
        raise ModelError(f"a replacement '{kind}' has spans {str(spans)[:50]!r}, expected pairs of numbers by layer")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_spans(spans: Any) -> bool:
    pairs = _is_list(spans) and len(spans) > 0 and all(_is_list(span) and len(span) == 2 for span in spans)
    return pairs and all(type(n) is int and 0 <= n <= MOST_UNITS for span in spans for n in span)


def cuts_of(part: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The cuts of one kind of units that a replacement of fewer units is made of; none where it is of another kind."""
    return part["cuts"] if part["kind"] == "parallel" else [part] if part["kind"] in CUTS else []


def one_share(pruning: Mapping[str, Mapping[str, Any]]) -> Fraction | None:
    """The share of their neurons that all smaller networks keep; None where shares or kinds differ."""
    cuts = [cut for part in pruning.values() for cut in cuts_of(part) or [part]]
    smaller = {(cut["kind"], Fraction(cut["size"], cut.get("of") or 1)) for cut in cuts if cut["size"] != cut.get("of")}
    kinds, shares = {kind for kind, _ in smaller}, {share for _, share in smaller}
    return shares.pop() if kinds == {"narrow"} and len(shares) == 1 else None


def label(part: Mapping[str, Any]) -> str:
    """Kind and size of a replacement, as in ``narrow-64``; of a parallel one all sizes."""
    sizes = [cut["size"] for cut in part["cuts"]] if part["kind"] == "parallel" else [part["size"]]
    return "-".join(map(str, [part["kind"], *sizes]))


def join(*paths: str) -> str:
    """A path inside a module inside a module; an empty one is the module itself."""
    return ".".join(path for path in paths if path)


def changed(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Paths of the modules that replacements make other ones.

    What cuts through a whole block changes its layers alone: other modules of the block may be replaced beside it.
    """
    paths: list[str] = []
    for path, part in parts.items():
        names = [name for cut in cuts_of(part) for side in ("rows", "columns", "between") for name in cut.get(side, ())]
        paths += [path] if path else names
    return paths


def _check_count(part: Mapping[str, Any], name: str, least: int, most: int) -> None:
    count = part.get(name)
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
        raise ModelError(
            f"a replacement '{part['kind']}' has {name} {str(count)[:50]}, expected a number from {least} to {most}"
        )
