"""The bundle: a plan and its trained substitutes, from which a pipeline is built.

bundle/plan.json                 the plan
bundle/substitutes.safetensors   one block for each run, named ``stack/first-last/...``
bundle/tuned.safetensors         kept weights that the output stage changed (if it did)
bundle/lora.safetensors          LoRA of kept blocks, by their path in the student (if the output stage trained one)
bundle/masks.safetensors         where substitutes' weights are zero, a bit each (if the run is sparse)
bundle/bundle.json               how it was trained, and hashes of the above
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.artifacts import SCHEMA_VERSION, load_artifact, save_artifact
from ppcl.common.files import (
    StoredTensors,
    Unread,
    atomic_path,
    file_digest,
    read_json,
    read_tensors,
    write_json,
    write_one_by_one,
    write_tensors,
)
from ppcl.common.outside import inside, printable
from ppcl.errors import ArtifactError, ModelError
from ppcl.student.assembly import (
    RunKey,
    assemble_student,
    in_dtypes_of,
    own_names,
    run_name,
    substitute_block,
    with_blocks,
)
from ppcl.student.masks import Masks, pack_masks, unpack_masks
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.record import register_plan
from ppcl.teacher.blocks import main_dtype, without_weights
from ppcl.teacher.families import Adapter, adapter_class
from ppcl.teacher.loading import stored_folder

SUBSTITUTES = "substitutes.safetensors"


@dataclass
class Bundle:
    """A plan with its substitutes.

    Attributes:
        plan: The plan.
        substitutes: One block for each of its runs and of its blocks with smaller modules.
        tuned: Student parameters by name that differ from the teacher's, substitutes excluded.
        lora: ``<layer>.lora_A.weight`` and ``lora_B.weight`` of kept blocks: to their weight belongs B A. The factors
            and not their sums are kept, so that the bundle of a large model stays small.
        masks: Of substitutes with zeros, by ``stack/first-last/path.weight``: true where a weight stays.
    """

    plan: CompressionPlan
    substitutes: Mapping[RunKey, nn.Module]
    tuned: Mapping[str, Tensor] = field(default_factory=dict)
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def members(self) -> list[tuple[RunKey, Segment]]:
        """The plan's segments that have a substitute."""
        return members(self.plan)


def members(plan: CompressionPlan) -> list[tuple[RunKey, Segment]]:
    """The plan's segments that have a substitute, with its key."""
    return [
        ((stack, segment.first, segment.last), segment)
        for stack, segments in plan.stacks.items()
        for segment in segments
        if segment.is_substitute
    ]


def save_bundle(bundle: Bundle, folder: Path, how: dict[str, Any], transformer: nn.Module) -> None:
    """Write a bundle folder, atomically.

    Args:
        bundle: What to write.
        folder: Where.
        how: How it was trained.
        transformer: The teacher's: substitutes are stored in its dtypes, in which they are exported.
    """
    tensors = {
        f"{run_name(key)}/{name}": state[name]
        for key, segment in members(bundle.plan)
        for like in [transformer.get_submodule(f"{key[0]}.{key[1]}")]
        for state in [in_dtypes_of(bundle.substitutes[key].state_dict(), like)]
        for name in own_names(segment, list(state))
    }

    def write(inside: Path) -> None:
        write_tensors(inside / SUBSTITUTES, tensors)
        for name, extra in (("tuned", bundle.tuned), ("lora", bundle.lora), ("masks", pack_masks(bundle.masks))):
            if extra:
                write_tensors(inside / f"{name}.safetensors", extra)

    _publish(bundle.plan, folder, how, write)


def save_stored_bundle(
    plan: CompressionPlan, stored: Callable[[RunKey], Path], folder: Path, how: dict[str, Any]
) -> None:
    """Write a bundle folder as :func:`save_bundle` does, with one weight in memory at a time.

    Args:
        plan: The plan.
        stored: Where the weights of a run's substitute are, by their names inside it.
        folder: The bundle.
        how: How it was trained.
    """
    tensors: dict[str, Unread] = {}
    for key, segment in members(plan):
        weights = StoredTensors(stored(key))
        for name in own_names(segment, list(weights)):
            tensors[f"{run_name(key)}/{name}"] = weights.unread(name)
    # large numbers first, then by name, as safetensors itself has them
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: tensors[name] for name in order}
    _publish(plan, folder, how, lambda inside: write_one_by_one(inside / SUBSTITUTES, ordered))


def _publish(plan: CompressionPlan, folder: Path, how: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Write plan, weights and hashes, atomically."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_artifact(plan, temporary / "plan.json")
        write(temporary)
        hashes = {p.name: file_digest(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / "bundle.json", {"schema_version": SCHEMA_VERSION, "files": hashes, **how})


def check_bundle(folder: Path) -> None:
    """Read all files of a bundle, and compare them with what was written.

    Raises:
        ArtifactError: A file is missing, damaged, or does not belong to the others.
    """
    about = read_json(folder / "bundle.json")
    if not isinstance(about, dict) or not isinstance(about.get("files"), dict):
        raise ArtifactError(f"{folder / 'bundle.json'} is not of a bundle; delete {folder} and run again")
    for name, expected in about["files"].items():
        file = inside(folder, name, str(folder / "bundle.json"))
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; delete {folder} and run again")
        if file_digest(file) != expected:
            raise ArtifactError(f"{file} is damaged or of another bundle; delete {folder} and run again")


def check_fits(plan: CompressionPlan, model: str, path: Path) -> None:
    """Put a plan's student together without weights, before anything of an older one is removed.

    Args:
        plan: The plan.
        model: The teacher; one whose files are not here, or are quantised, is not looked at.
        path: Where the plan is, for the message.

    Raises:
        ArtifactError: It names what the teacher has not.
    """
    folder = stored_folder(model)
    if folder is None:
        return
    try:
        teacher = without_weights(folder, torch.float32)
    except ModelError:
        return
    try:
        adapter = adapter_class(type(teacher))
        if plan.stacks.keys() != {spec.name for spec in adapter.stacks}:
            raise ValueError(f"stacks {', '.join(map(repr, plan.stacks))}")
        substitutes = {
            (spec.name, segment.first, segment.last): substitute_block(adapter.blocks(teacher, spec), segment)
            for spec in adapter.stacks
            for segment in plan.stacks[spec.name]
            if segment.is_substitute
        }
        assemble_student(teacher, adapter, plan, substitutes)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        reason = printable(str(error))[:200] or type(error).__name__
        raise ArtifactError(f"{path} does not fit the model ({reason}); delete it and run again") from None


def load_bundle(folder: Path, transformer: nn.Module, adapter: Adapter) -> Bundle:
    """Read a bundle for a teacher.

    Raises:
        ArtifactError: A file is missing, damaged, or does not belong to the others.
    """
    check_bundle(folder)
    plan = load_artifact(CompressionPlan, folder / "plan.json")
    tensors, _ = read_tensors(folder / SUBSTITUTES)
    substitutes: dict[RunKey, nn.Module] = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        for segment in plan.stacks[spec.name]:
            if segment.is_substitute:
                key = (spec.name, segment.first, segment.last)
                prefix = f"{run_name(key)}/"
                block = substitute_block(blocks, segment)
                state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                if state.keys() != set(own_names(segment, list(block.state_dict()))):
                    raise ArtifactError(f"{folder} has other weights than its plan; delete it and run again")
                block.load_state_dict(state, strict=False)
                substitutes[key] = block
    extra = [folder / f"{name}.safetensors" for name in ("tuned", "lora", "masks")]
    tuned, lora, packed = (read_tensors(path)[0] if path.is_file() else {} for path in extra)
    masks = unpack_masks(packed, substitutes)
    Masks(masks, substitutes).hold_weights()
    return Bundle(plan, substitutes, tuned, lora, masks)


@torch.no_grad()
def build_student(transformer: nn.Module, adapter: Adapter, bundle: Bundle, dtype: torch.dtype | None = None) -> Any:
    """Build the student of a bundle as an independent model, with counts and provenance in its config.

    Args:
        transformer: The teacher's transformer; it is left as it is.
        adapter: Its family.
        bundle: Plan, substitutes, tuned weights.
        dtype: The weights' dtype; the teacher's, weight by weight, if None.
    """
    import copy

    student = assemble_student(transformer, adapter, bundle.plan, bundle.substitutes)
    lists = {spec.name: [copy.deepcopy(b) for b in adapter.blocks(student, spec)] for spec in adapter.stacks}
    student = with_blocks(student, lists, own=True)
    for name, module in list(student._modules.items()):
        if name not in lists:
            student._modules[name] = copy.deepcopy(module)
    register_plan(student, adapter, bundle.plan)
    parameters = dict(student.named_parameters())
    for name, value in bundle.tuned.items():
        parameters[name].copy_(value)
    _merge_lora(parameters, bundle.lora)
    student.requires_grad_(False).eval()
    if dtype is not None:
        return student.to(dtype)
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        for block, segment in zip(adapter.blocks(student, spec), bundle.plan.stacks[spec.name], strict=True):
            _cast_like(block, blocks[start_index(segment.first, segment.last, segment.start)])
    return student


def _merge_lora(parameters: Mapping[str, nn.Parameter], lora: Mapping[str, Tensor]) -> None:
    """Add B A to the weights, in float32 at least."""
    for name, a in lora.items():
        if name.endswith(".lora_A.weight"):
            weight, b = parameters[name.replace("lora_A.", "")], lora[name.replace("lora_A", "lora_B")]
            weight.copy_(weight + (b @ a).to(weight.device))


def _cast_like(block: nn.Module, like: nn.Module) -> None:
    """Give a block the dtypes of another."""
    dtypes, main = {name: parameter.dtype for name, parameter in like.named_parameters()}, main_dtype(like)
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, main))
