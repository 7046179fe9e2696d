"""The export of a transformer that is never in memory: weights are read, from the teacher or the bundle, and written.

The student is built without weights by the functions that build it with them. Its names say where each weight is; what
is written are the bytes that :func:`ppcl.export.pipeline.export` writes in the same dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.tensor_files import StoredTensors, Unread, read_tensor_header, safetensors_name, write_one_by_one
from ppcl.config import ExportConfig
from ppcl.errors import ArtifactError
from ppcl.export.pipeline import Parts, cast, dtype_of, shard_size, write_pipeline
from ppcl.student.assembly import (
    RunKey,
    assemble_student,
    own_names,
    run_name,
    substitute_block,
)
from ppcl.student.bundle import check_blocks, check_bundle, check_teacher, read_plan
from ppcl.student.masks import unpack_masks
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.record import register_plan
from ppcl.teacher.blocks import StreamedBlocks, without_weights
from ppcl.teacher.families import Adapter
from ppcl.teacher.loading import WEIGHTS_NAME, stored_folder, weight_files


def export_streamed(
    blocks: StreamedBlocks,
    bundle: Path,
    source: str,
    out: Path,
    settings: ExportConfig,
    card: Callable[[Path], str] | None = None,
    beside: Path | None = None,
) -> Path:
    """Write the pipeline of a bundle with one weight of its transformer in memory at a time.

    Args:
        blocks: The teacher's, whose files the kept weights are read from.
        bundle: The bundle's folder.
        source: What the teacher is loaded from; its files are here.
        out: The folder to write.
        settings: See :class:`ExportConfig`.
        card: Makes the model card of the written folder; one of the plan alone if None.
        beside: See :func:`ppcl.export.pipeline.export`.

    Returns:
        ``out``.

    Raises:
        ArtifactError: The bundle is damaged or does not belong to the teacher, or what was written is not the student.
        UserError: The folder cannot be written.
    """
    check_bundle(bundle)
    plan = read_plan(bundle)
    check_teacher(plan, source, bundle)
    component = plan.model.component
    folder, dtype = stored_folder(source), dtype_of(source, settings, component)
    assert folder is not None  # or there were no blocks to read
    assert dtype is not None
    teacher = without_weights(folder, dtype, component)
    check_blocks(plan, teacher, blocks.adapter, bundle)
    weights = StudentWeights(teacher, blocks.adapter, plan, bundle, blocks.stored)
    student = weights.student
    cast(student, dtype)

    def write(folder: Path) -> None:
        write_weights(student, weights.read, folder / component, settings)

    def check(folder: Path) -> None:
        _check_headers(folder, student, dtype, settings.variant, component)

    return write_pipeline(Parts(None, student, plan, source, write, check, beside), out, settings, card)


@dataclass(frozen=True)
class Origin:
    """Where a weight of the student comes from.

    Attributes:
        teacher: Its name in the teacher's transformer; empty for a weight of the bundle.
        bundle: Its name in the bundle; empty for one of the teacher's.
    """

    teacher: str = ""
    bundle: str = ""


class StudentWeights:
    """The weights of a student, each read when it is asked for.

    Args:
        teacher: The transformer without weights.
        adapter: Its family.
        plan: The bundle's.
        bundle: The bundle's folder.
        stored: Reads a weight of the teacher by its name.

    Attributes:
        student: Without weights, of its class and with the plan in its config.

    Raises:
        ArtifactError: The bundle holds other weights than its plan asks for.
    """

    def __init__(
        self, teacher: Any, adapter: Adapter, plan: CompressionPlan, bundle: Path, stored: Callable[[str], Tensor]
    ) -> None:
        self.plan, self.bundle, self.stored = plan, bundle, stored
        self.substitutes: dict[RunKey, nn.Module] = {
            (spec.name, segment.first, segment.last): substitute_block(adapter.blocks(teacher, spec), segment)
            for spec in adapter.stacks
            for segment in plan.stacks[spec.name]
            if segment.is_substitute
        }
        self.student = assemble_student(teacher, adapter, plan, self.substitutes)
        self.student.requires_grad_(False).eval()
        register_plan(self.student, adapter, plan)
        self.origins = self._origins()
        self._check()

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A weight of the student by its name, on the CPU, in the dtype that it is stored in, or a higher one."""
        origin = self.origins[name]
        if name in self._tuned:
            weight = self._tensor("tuned", name)
        elif origin.teacher:
            weight = self.stored(origin.teacher)
        else:
            weight = self._tensor("substitutes", origin.bundle)
        if origin.bundle in self._masks:
            packed = {origin.bundle: self._tensor("masks", origin.bundle)}
            weight = weight * unpack_masks(packed, self.substitutes)[origin.bundle].to(torch.uint8)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in self._lora:
            a, b = (self._tensor("lora", f"{layer}.lora_{factor}.weight") for factor in "AB")
            weight = weight.float() + b @ a
        return weight

    def _origins(self) -> dict[str, Origin]:
        origins = {}
        for name in self.student.state_dict():
            stack, _, rest = name.partition(".")
            if stack not in self.plan.stacks:
                origins[name] = Origin(teacher=name)
                continue
            position, _, inner = rest.partition(".")
            segment, index = self._places[stack][int(position)]
            key = (stack, segment.first, segment.last)
            if segment.is_substitute and inner in self._own[key]:
                origins[name] = Origin(bundle=f"{run_name(key)}/{inner}")
            else:
                origins[name] = Origin(teacher=f"{stack}.{index}.{inner}")
        return origins

    @cached_property
    def _own(self) -> dict[RunKey, set[str]]:
        """Of each substitute, the names of its weights that are in the bundle."""
        segments = {(n, s.first, s.last): s for n, segments in self.plan.stacks.items() for s in segments}
        return {key: set(own_names(segments[key], list(block.state_dict()))) for key, block in self.substitutes.items()}

    @cached_property
    def _places(self) -> dict[str, Sequence[tuple[Segment, int]]]:
        """Of each block of the student, its segment, and the teacher's block whose weights it has, by stack."""
        places: dict[str, Sequence[tuple[Segment, int]]] = {}
        for name, segments in self.plan.stacks.items():
            found: list[tuple[Segment, int]] = []
            for segment in segments:
                if segment.is_substitute:
                    found.append((segment, start_index(segment.first, segment.last, segment.start)))
                else:
                    found += [(segment, index) for index in range(segment.first, segment.last + 1)]
            end = segments[-1].last + 1
            tail = range(end, end + len(getattr(self.student, name)) - len(found))
            places[name] = [*found, *((Segment(index, index), index) for index in tail)]
        return places

    def _check(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.student.state_dict().items()}
        expected = {origin.bundle: shapes[name] for name, origin in self.origins.items() if origin.bundle}
        header = read_tensor_header(self.bundle / "substitutes.safetensors")
        if {name: tuple(entry["shape"]) for name, entry in header.items()} != expected or self._masks - set(expected):
            raise ArtifactError(f"{self.bundle} has other weights than its plan; delete it and run again")
        layers = {f"{name.partition('.lora_')[0]}.weight" for name in self._lora}
        strange = sorted((self._tuned | layers) - set(shapes))
        if strange:
            raise ArtifactError(f"{self.bundle} has {strange[0]}, which its student has not; delete it and run again")

    def _names(self, kind: str) -> set[str]:
        path = self.bundle / f"{kind}.safetensors"
        return set(read_tensor_header(path)) if path.is_file() else set()

    @cached_property
    def _tuned(self) -> set[str]:
        return self._names("tuned")

    @cached_property
    def _lora(self) -> set[str]:
        return self._names("lora")

    @cached_property
    def _masks(self) -> set[str]:
        return self._names("masks")

    def _tensor(self, kind: str, name: str) -> Tensor:
        return StoredTensors(self.bundle / f"{kind}.safetensors")[name].clone()


def write_weights(student: Any, read: Callable[[str], Tensor], folder: Path, settings: ExportConfig) -> None:
    """Write a transformer's config and weights as ``save_pretrained`` does, byte by byte, one weight at a time.

    Args:
        student: Without weights; its dtypes are those to write.
        read: Reads a weight by its name.
        folder: The transformer's.
        settings: Size of a file, and variant in its name.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    student.save_config(folder)
    weights: Mapping[str, Tensor] = student.state_dict()
    suffix = f".{settings.variant}" if settings.variant else ""
    # a variant stands before the number of a shard; a tensor without a place in memory shares none with another
    shards = split_state_dict_into_shards_factory(
        weights,  # type: ignore[arg-type]
        get_storage_size=lambda tensor: tensor.numel() * tensor.dtype.itemsize,
        filename_pattern=f"{WEIGHTS_NAME}{suffix}{{suffix}}.safetensors",
        max_shard_size=shard_size(weights, settings),
    )
    for file, names in shards.filename_to_tensors.items():
        names = sorted(names, key=lambda name: (-weights[name].dtype.itemsize, name))  # as safetensors lays them out
        unread = {n: Unread(tuple(weights[n].shape), weights[n].dtype, partial(read, n)) for n in names}
        write_one_by_one(folder / file, unread, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{WEIGHTS_NAME}.safetensors.index{suffix}.json").write_text(text, encoding="utf-8")


def _check_headers(folder: Path, student: Any, dtype: torch.dtype, variant: str | None, component: str) -> None:
    """Compare the files' headers with what the written config builds, and with what was to be written."""
    transformer = without_weights(folder, dtype, component)  # as the written config has it
    built = {name: list(tensor.shape) for name, tensor in transformer.state_dict().items()}
    wanted = {name: (built.get(name), safetensors_name(tensor.dtype)) for name, tensor in student.state_dict().items()}
    written = {
        name: (entry["shape"], entry["dtype"])
        for file in sorted(set(weight_files(folder, variant, component).values()))
        for name, entry in read_tensor_header(file).items()
    }
    wrong = sorted(name for name in {*built, *wanted, *written} if written.get(name) != wanted.get(name))
    if wrong:
        raise ArtifactError(f"the exported transformer does not match its config ({wrong[0]}); please report this")
