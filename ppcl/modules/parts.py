"""What describes a smaller module: its kind, its size, and what else the kind needs. No torch.

Descriptions come from plans and from the configs of exported pipelines. What is checked here needs no model; whether a
description suits the module that it names is asked when that is replaced (:mod:`ppcl.modules.replacements`).
"""

from __future__ import annotations

import re
from typing import Any

from ppcl.errors import ModelError

SLICED = ("narrow", "heads")
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
    kind = part.get("kind") if isinstance(part, dict) else None
    if kind not in KINDS:
        raise ModelError(f"a module cannot be replaced by {str(kind or part)[:100]!r}; known kinds: {', '.join(KINDS)}")
    least = 1 if kind in ("low_rank", *SLICED) else 0
    _check_count(part, "size", least, MOST_UNITS)
    if kind not in SLICED:
        return
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
    for side in ("rows", "columns"):
        names = part.get(side)
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ModelError(f"a replacement '{kind}' has {side} {str(names)[:50]!r}, expected names of linear layers")


def _check_count(part: dict[str, Any], name: str, least: int, most: int) -> None:
    count = part.get(name)
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
        raise ModelError(
            f"a replacement '{part['kind']}' has {name} {str(count)[:50]}, expected a number from {least} to {most}"
        )
