"""What the LoRA bridge tells: where every tensor went (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MappingReport:
    """What became of the tensors of a LoRA.

    Attributes:
        mapped: New key of each block tensor that stayed, by its old key.
        dropped: Keys of block tensors that were left out.
        other: Keys outside of the block lists; they stay as they are.
        moved: Old and new name, such as ``transformer_blocks.5``, of every block that kept its LoRA.
        lost: Names of the teacher's blocks, or of modules inside them, whose LoRA was left out.
        strength: What the scale of the updates comes from; empty where the file could not be looked at.
        cut: New keys of the tensors that were cut to the neurons or heads that their module kept.
        folded: For each layer of low rank that took its LoRA, by its name in the compressed transformer, the share of
            the update that it can express (1: all of it); see :mod:`ppcl.pipelines.lora_low_rank`.
    """

    mapped: Mapping[str, str]
    dropped: tuple[str, ...]
    other: tuple[str, ...]
    moved: tuple[tuple[str, str], ...]
    lost: tuple[str, ...]
    strength: str = ""
    cut: tuple[str, ...] = ()
    folded: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"mapped: {len(self.mapped)} tensors of {len(self.moved)} blocks"]
        lines += [f"  {old} -> {new}" for old, new in self.moved]
        lines.append(f"dropped: {len(self.dropped)} tensors of {len(self.lost)} blocks or modules that were replaced")
        lines += [f"  {name}" for name in self.lost]
        if self.cut:
            lines.append(f"cut to the neurons and heads that were kept: {len(self.cut)} tensors")
        if self.folded:
            low, high = min(self.folded.values()), max(self.folded.values())
            lines.append(
                f"layers of low rank: {len(self.folded)}, which take {low:.0%} to {high:.0%} of their LoRA"
                + ("" if low > 0.99 else "; load_lora(..., low_rank='widen') takes all of it")
            )
        lines.append(f"outside of the blocks, unchanged: {len(self.other)} tensors")
        return "\n".join([*lines, self.strength] if self.strength else lines)
