"""The masks of a distillation: made once, kept beside the checkpoints, held through all stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.files import digest
from ppcl.common.progress import announce
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.config.sparsity import SparsityConfig
from ppcl.pruning.sparsity import make_masks, sparse_layers, sparsity_cost
from ppcl.student.assembly import RunKey
from ppcl.student.masks import Masks, pack_masks, unpack_masks
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import Adapter
from ppcl.training.distributed import SINGLE, Group


def masks_for(
    student: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    substitutes: Mapping[RunKey, nn.Module],
    states: States,
    settings: SparsityConfig,
    seed: int,
    folder: Path,
    group: Group = SINGLE,
) -> Masks:
    """Make the masks of a student, or read those that this distillation began with; its zeros are in place then.

    What was made is kept: scores that are not the same to the last bit after a restart would move zeros.

    Args:
        student: The student, untrained.
        adapter: Its family.
        plan: A sparse plan (:func:`ppcl.pruning.sparsity.sparse_plan`).
        substitutes: One block for each of its segments.
        states: Training states.
        settings: See :class:`SparsityConfig`.
        seed: Fixes what is drawn at random.
        folder: Where ``masks.safetensors`` is kept; all processes must see it.
        group: The processes that train; the first one makes the masks.

    Raises:
        ModelError: The pattern fits no layer.
        ConfigError: The criterion cannot be used.
    """
    path = folder / "masks.safetensors"
    fingerprint = digest(settings.identity(), to_jsonable(plan.stacks), seed)

    def known() -> dict[str, Any] | None:
        tensors, meta = read_tensors(path) if path.is_file() else ({}, None)
        return tensors if meta and meta.get("fingerprint") == fingerprint else None

    def make() -> None:
        if known() is not None:
            return
        layers = sparse_layers(plan, adapter, substitutes, settings)
        batches = list(states.batches(settings.batch_size, settings.states))
        count = min(len(states), settings.states)
        cost = sparsity_cost(settings, count, len({layer.block for layer in layers}))
        announce(
            f"sparsity {settings.pattern}, criterion {settings.criterion}, allocation {settings.allocation}: "
            f"{len(layers)} layers, {count} states, {cost:,.0f} runs of the transformer on one state"
        )
        masks = make_masks(student, layers, batches, settings, seed)
        write_tensors(path, pack_masks(masks), {"fingerprint": fingerprint, "teacher_forwards": cost})

    group.on_main(make)
    made = Masks(unpack_masks(known() or {}, substitutes), substitutes)
    made.hold_weights()
    return made
