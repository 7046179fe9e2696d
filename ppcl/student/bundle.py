"""The bundle: a plan and its trained substitutes, from which a pipeline is built.

bundle/plan.json                 the plan
bundle/substitutes.safetensors   one block for each run, named ``stack/first-last/...``
bundle/tuned.safetensors         kept weights that the output stage changed (if it did)
bundle/lora.safetensors          LoRA of kept blocks, by their path in the student (if the output stage trained one)
bundle/masks.safetensors         where substitutes' weights are zero, a bit each (if the run is sparse)
bundle/bundle.json               how it was trained, and hashes of the above
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.artifacts import SCHEMA_VERSION, load_artifact, save_artifact
from ppcl.common.files import atomic_path, file_digest, read_mapping, write_json
from ppcl.common.outside import inside, printable
from ppcl.common.tensor_files import StoredTensors, Unread, read_tensors, write_one_by_one, write_tensors
from ppcl.errors import ArtifactError, ModelError, shortened
from ppcl.student.assembly import (
    RunKey,
    assemble_student,
    in_dtypes_of,
    own_names,
    run_name,
    smaller_on_meta,
    substitute_block,
    with_blocks,
)
from ppcl.student.masks import Masks, pack_masks, unpack_masks
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.prediction import predict
from ppcl.student.record import register_plan
from ppcl.teacher.blocks import main_dtype, without_weights
from ppcl.teacher.families import Adapter, adapter_class
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import check_model, model_path, stored_folder
from ppcl.teacher.origin import weights_digest

SUBSTITUTES = "substitutes.safetensors"
EXTRAS = ("tuned", "lora", "masks")
FILES = ("plan.json", SUBSTITUTES, *(f"{name}.safetensors" for name in EXTRAS))


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
    plan: CompressionPlan,
    stored: Callable[[RunKey], Path],
    folder: Path,
    how: dict[str, Any],
    lora: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a bundle folder as :func:`save_bundle` does, with one weight in memory at a time.

    Args:
        plan: The plan.
        stored: Where the weights of a run's substitute are, by their names inside it.
        folder: The bundle.
        how: How it was trained.
        lora: See :class:`Bundle`.
    """
    tensors: dict[str, Unread] = {}
    for key, segment in members(plan):
        weights = StoredTensors(stored(key))
        for name in own_names(segment, list(weights)):
            tensors[f"{run_name(key)}/{name}"] = weights.unread(name)
    # large numbers first, then by name, as safetensors itself has them
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: tensors[name] for name in order}

    def write(inside: Path) -> None:
        write_one_by_one(inside / SUBSTITUTES, ordered)
        if lora:
            write_tensors(inside / "lora.safetensors", dict(lora))

    _publish(plan, folder, how, write)


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
    files = read_mapping(folder / "bundle.json", remedy=f"delete {folder} and run again").get("files")
    for name in files if isinstance(files, dict) else ():
        inside(folder, name, str(folder / "bundle.json"))
    if not (isinstance(files, dict) and {"plan.json", SUBSTITUTES} <= files.keys() <= set(FILES)):
        raise ArtifactError(f"{folder / 'bundle.json'} is not of a bundle; delete {folder} and run again")
    for name in FILES:
        if name not in files and not (folder / name).exists():
            continue
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing; delete {folder} and run again")
        if file_digest(folder / name) != files.get(name):
            raise ArtifactError(f"{folder / name} is damaged or of another bundle; delete {folder} and run again")


def read_plan(folder: Path) -> CompressionPlan:
    """The plan of a bundle.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    return load_artifact(CompressionPlan, folder / "plan.json")


def check_teacher(plan: CompressionPlan, model: str, folder: Path) -> None:
    """Refuse a bundle of other weights than a model has here; nothing is loaded.

    Args:
        plan: Of the bundle.
        model: Name of the teacher.
        folder: The bundle's.

    Raises:
        ArtifactError: The weights are others.
        ModelError: There is no such model.
    """
    check_model(model)
    made_of = plan.model.weights_digest
    if made_of and made_of != weights_digest(model):
        raise ArtifactError(
            f"{folder} was made of other weights than {model} has here ({Path(model_path(model)).resolve()}); give it "
            "the teacher that it was made of, or run ppcl compress again"
        )


def check_fits(plan: CompressionPlan, model: str, path: Path) -> None:
    """Refuse a plan that is not for a model, by the shapes of its weights, before anything of an older one is removed.

    Args:
        plan: The plan.
        model: The teacher; one whose files are not here, or are quantised, is not looked at.
        path: Where the plan lies, for the message.

    Raises:
        ArtifactError: It is for another model, or saves not what it says.
    """
    folder = stored_folder(model)
    if folder is None:
        return
    try:
        teacher = without_weights(folder, torch.float32, plan.model.component)
    except ModelError:
        return  # loading it says what is wrong, or is able to
    check_blocks(plan, teacher, adapter_class(type(teacher)), path)


def check_blocks(plan: CompressionPlan, transformer: nn.Module, adapter: Adapter, path: Path) -> None:
    """Refuse a plan whose blocks, smaller modules or prediction are not a transformer's.

    Args:
        plan: The plan.
        transformer: The teacher's; weights are not looked at and may be missing.
        adapter: Its family.
        path: Where the plan lies, for the message.

    Raises:
        ArtifactError: It is for another model, or saves not what it says.
    """
    try:
        found = {spec.name: tuple(map(count_params, adapter.blocks(transformer, spec))) for spec in adapter.stacks}
        if found != {stack.name: stack.block_params for stack in plan.model.stacks}:
            raise ArtifactError("the teacher has other blocks")
        for spec in adapter.stacks:
            blocks = adapter.blocks(transformer, spec)
            for segment in plan.stacks[spec.name]:
                whole = blocks[start_index(segment.first, segment.last, segment.start)]
                saved = saved_params(whole, segment) if segment.width else 0
                if saved != segment.saved_params:
                    name = run_name((spec.name, segment.first, segment.last))
                    raise ArtifactError(f"{name} saves {saved} parameters, not {segment.saved_params}")
        expected = predict(plan.model, plan.stacks, plan.predicted.error)
        if expected.params != plan.predicted.params or not math.isclose(
            expected.param_ratio, plan.predicted.param_ratio, rel_tol=1e-6
        ):
            raise ArtifactError(f"it leaves {expected.params} parameters, not {plan.predicted.params}")
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as reason:
        raise ArtifactError(
            f"{path} does not fit the model ({shortened(printable(str(reason)))}); delete it and run again"
        ) from None


def saved_params(whole: nn.Module, segment: Segment) -> int:
    """Parameters that a segment's smaller modules save in a block; its weights are not looked at.

    Raises:
        ModelError: The block has no such modules.
    """
    return count_params(whole) - count_params(smaller_on_meta(whole, segment.width))


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of other names or shapes.

    Args:
        found: What was read.
        expected: What has all of the names, and their shapes.
        path: Where they lie, for the message.

    Raises:
        ArtifactError: There are others.
    """
    for name, tensor in found.items():
        shape = tuple(expected[name].shape) if name in expected else None
        if shape != tuple(tensor.shape):
            raise ArtifactError(
                f"{path} has '{name}' of shape {tuple(tensor.shape)}, its student {shape or 'none'}; delete it and run "
                "again"
            )


def load_bundle(folder: Path, transformer: nn.Module, adapter: Adapter, model: str | None = None) -> Bundle:
    """Read a bundle for a teacher.

    Args:
        folder: The bundle's.
        transformer: The teacher's.
        adapter: Its family.
        model: What the teacher was loaded from, to compare its weights with those that the bundle was made of.

    Raises:
        ArtifactError: A file is missing, damaged, or does not belong to the others, or to the teacher.
    """
    check_bundle(folder)
    plan = read_plan(folder)
    if model is not None:
        check_teacher(plan, model, folder)
    check_blocks(plan, transformer, adapter, folder)
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
                check_weights(state, block.state_dict(), folder / SUBSTITUTES)
                block.load_state_dict(state, strict=False)
                substitutes[key] = block
    extra = [folder / f"{name}.safetensors" for name in EXTRAS]
    tuned, lora, packed = (read_tensors(path)[0] if path.is_file() else {} for path in extra)
    masks = unpack_masks(packed, substitutes)
    Masks(masks, substitutes).hold_weights()
    bundle = Bundle(plan, substitutes, tuned, lora, masks)
    weights = assemble_student(transformer, adapter, plan, substitutes).state_dict()
    check_weights(tuned, weights, extra[0])
    check_weights(_lora_sums(lora, extra[1]), weights, extra[1])
    return bundle


def _lora_sums(lora: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Of factors B and A by the weight that they belong to, a tensor of the shape of B A; no product is made."""
    shapes = {}
    for name in lora:
        layer, _, factor = name.rpartition(".lora_")
        a, b = (lora.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if (
            factor not in ("A.weight", "B.weight")
            or a is None
            or b is None
            or a.ndim != 2
            or a.shape[:1] != b.shape[1:]
        ):
            raise ArtifactError(f"{path} has '{name}' without its other factor; delete it and run again")
        shapes[f"{layer}.weight"] = torch.empty(len(b), a.shape[1], device="meta")
    return shapes


@torch.no_grad()
def build_student(transformer: nn.Module, adapter: Adapter, bundle: Bundle, dtype: torch.dtype | None = None) -> Any:
    """Build the student of a bundle as an independent model, with counts and provenance in its config.

    Args:
        transformer: The teacher's transformer; it is left as it is.
        adapter: Its family.
        bundle: Plan, substitutes, tuned weights.
        dtype: The weights' dtype; the teacher's, weight by weight, if None.
    """
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
