"""The stored LoraConfig of a LoRA file names modules too: ranks, alphas, targets (no torch here)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the LoraConfig, as JSON


def scaling_note(keys: Collection[str], header: Collection[str]) -> str:
    """Say what decides how strong a LoRA is: the stored config, alphas among the tensors, or nothing.

    Args:
        keys: Names of the file's own tensors, before any conversion.
        header: Names in the file's metadata.
    """
    if METADATA_KEY in header:
        return "strength: alpha and rank from the file's metadata"
    if any(key.endswith(".alpha") for key in keys):
        return "strength: the alphas among the file's tensors"
    return (
        "strength: neither metadata nor alphas in the file, so every update is added as it is (alpha = rank), as "
        "diffusers does; if it was trained with another alpha, set the weight alpha / rank with pipe.set_adapters"
    )


def remap_metadata(metadata: Mapping[str, Any], modules: Mapping[str, str], spell_out: bool = False) -> dict[str, Any]:
    """Rename the blocks inside the stored config of a LoRA.

    A pattern that could tell blocks apart (it has a digit, a list's name, or is a regular
    expression) is written out for the modules that it matched; plain layer names stay.

    Args:
        metadata: What diffusers stores as ``lora_adapter_metadata``; its keys are prefixed with the component.
        modules: New path of every module of the transformer whose LoRA stayed, by its old path.
        spell_out: Write plain layer names out as well: some layers go by another name now.

    Returns:
        A changed copy.
    """
    out = dict(metadata)
    for key, value in metadata.items():
        component, _, name = key.rpartition(".")
        if component not in ("", "transformer") or not value:
            continue
        if name in ("rank_pattern", "alpha_pattern"):
            out[key] = _expand(value, modules, spell_out)
        elif name == "target_modules" and (spell_out or isinstance(value, str) or any(_names_blocks(v) for v in value)):
            out[key] = sorted(set(modules.values()))
        elif name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            out[key] = None  # the tensors decide; by number these would now mean other blocks
            out[f"{component}.target_modules".lstrip(".")] = sorted(set(modules.values()))
    return out


def _names_blocks(pattern: str) -> bool:
    return bool(re.search(r"\d|blocks|layers|[\\^$*+?|()\[\]]", pattern))


def _expand(patterns: Mapping[str, Any], modules: Mapping[str, str], spell_out: bool) -> dict[str, Any]:
    """Write the patterns that name blocks out for each module; PEFT takes the first pattern that matches."""
    out: dict[str, Any] = {}
    for pattern, value in patterns.items():
        if not spell_out and not _names_blocks(pattern):
            out.setdefault(pattern, value)
            continue
        for old, new in modules.items():
            if re.match(rf"(.*\.)?({pattern})$", old):
                out.setdefault(f"^{new}", value)
    return out
