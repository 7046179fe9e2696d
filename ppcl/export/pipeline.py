"""The export stage: bundle -> an ordinary diffusers pipeline folder with a model card."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppcl import __version__
from ppcl.capture.jumps import FEW_STEPS
from ppcl.common.files import atomic_path, link_file, read_json, write_json, write_text
from ppcl.common.outside import check_links, real_places
from ppcl.common.tensor_files import variant_of
from ppcl.config import ExportConfig
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ArtifactError, ConfigError
from ppcl.export.card import model_card, written_facts
from ppcl.modules.remote_code import name_class, write_code
from ppcl.student.plan import CompressionPlan, plan_digest
from ppcl.teacher.block_map import RECORD
from ppcl.teacher.loading import check_names, source_name, stored_dtype, stored_folder
from ppcl.teacher.stored import weight_map

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model_index.json"
# Weights alone are linked: configs and tokenizers are small, and tools rewrite them in place, which
# would reach the teacher through a link.
WEIGHTS = (".safetensors", ".bin", ".gguf")
TOP_LEVEL = ("LICENSE*", "LICENCE*", "NOTICE*", "*.py")  # beside the components: terms, and custom pipeline code


def export(
    pipeline: Any,
    student: Any,
    plan: CompressionPlan,
    source: str,
    out: Path,
    settings: ExportConfig,
    card: Callable[[Path], str] | None = None,
    beside: Path | None = None,
) -> Path:
    """Write the pipeline with the student in the transformer's place; nothing of ours is needed to load it.

    The other components are the source's own files, copied byte by byte or linked, where they
    lie in a folder or in the hub's cache, and are saved from memory otherwise.

    Args:
        pipeline: The teacher's pipeline (any dtype).
        student: The compressed transformer with its counts registered; it is cast in place, unless it is quantised
            (:func:`ppcl.export.quantised.quantised`).
        plan: For the provenance and the model card.
        source: What the teacher was loaded from.
        out: The folder to write.
        settings: See :class:`ExportConfig`.
        card: Makes the model card of the written folder; one of the plan alone if None.
        beside: The pipeline whose other components are taken along, the other expert's compressed one; the source's
            if None.

    Returns:
        ``out``.

    Raises:
        ArtifactError: The written transformer does not load back completely.
        UserError: The folder cannot be written.
    """
    component = plan.model.component
    dtype = dtype_of(source, settings, component)
    if dtype is not None and not is_quantised(student):
        cast(student, dtype)

    def write(folder: Path) -> None:
        # diffusers does not read bitsandbytes' 4 bits where a weight and its scales lie in two files
        one = getattr(student, "is_loaded_in_4bit", False)
        size = "1TB" if one else shard_size(student.state_dict(), settings)
        student.save_pretrained(folder / component, max_shard_size=size, variant=settings.variant)

    def check(folder: Path) -> None:
        _check(folder / component, type(student), settings.variant)

    return write_pipeline(Parts(pipeline, student, plan, source, write, check, beside), out, settings, card)


@dataclass(frozen=True)
class Parts:
    """What a pipeline is written from.

    Attributes:
        pipeline: The teacher's; None where all of it lies in files.
        student: The compressed transformer, whose config and class count; its weights may be elsewhere.
        plan: For the provenance and the model card.
        source: What the teacher was loaded from.
        write: Writes config and weights of the transformer below a pipeline folder.
        check: Refuses a pipeline folder whose transformer is not what its config says.
        beside: The pipeline whose other components are taken along; the source's if None.
    """

    pipeline: Any
    student: Any
    plan: CompressionPlan
    source: str
    write: Callable[[Path], None]
    check: Callable[[Path], None]
    beside: Path | None = None


def write_pipeline(parts: Parts, out: Path, settings: ExportConfig, card: Callable[[Path], str] | None) -> Path:
    """Write a pipeline folder, whole or not at all; see :func:`export`."""
    student, component = parts.student, parts.plan.model.component
    register_source(student, parts.plan, parts.source)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        folder = parts.beside or stored_folder(parts.source)
        write_components(parts.pipeline, folder, temporary, settings.components == "link", component)
        parts.write(temporary)
        if parts.plan.call:  # of few steps, whose noise levels are those that it was trained at
            sampler = temporary / "scheduler" / "scheduler_config.json"
            write_json(sampler, {**read_json(sampler), **FEW_STEPS})
        remote = settings.remote_code and "pruning" in student.config
        if remote:
            write_code(student, temporary / component)
        elif settings.remote_code:
            logger.warning("export.remote_code has no effect: this plan makes no module smaller, its class is stock")
        name_class(temporary, type(student).__name__, remote, component)
        text = (
            model_card(parts.plan, written_facts(parts.source, temporary, component))
            if card is None
            else card(temporary)
        )
        write_text(temporary / "README.md", text)
        hide_folders(temporary, source_name(parts.source))
        parts.check(temporary)
    return out


def hide_folders(pipeline: Path, name: str) -> None:
    """Leave the folders of this machine out of a pipeline's configs: they are published with it.

    Args:
        pipeline: The written folder; configs in it are no links.
        name: Of the source, in the place of the folder that a component was loaded from.
    """
    for path in sorted({*pipeline.glob("**/*config*.json"), *pipeline.glob("**/*_index.json")}):
        config = read_json(path)
        shown = _shown(config, name)
        if shown != config:
            write_text(path, json.dumps(shown, indent=2, ensure_ascii=False) + "\n")


def _shown(value: Any, name: str, key: str = "") -> Any:
    """A value of a config as others may see it."""
    if isinstance(value, dict):
        return {inner: _shown(entry, name, inner) for inner, entry in value.items()}
    if isinstance(value, list):
        return [_shown(entry, name) for entry in value]
    if not isinstance(value, str):
        return value
    if key.endswith("name_or_path"):
        is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and not Path(value).exists()
        return value if is_hub_id else name
    is_path = re.search(r"(path|file|dir|folder)$", key) is not None
    return Path(value).name if is_path and (Path(value).is_absolute() or value.startswith("~")) else value


def dtype_of(source: str, settings: ExportConfig, component: str = TRANSFORMER) -> torch.dtype | None:
    """What an exported transformer's weights are written in; None: as they are, of a teacher in no known dtype."""
    return stored_dtype(source, component=component) if settings.dtype == "auto" else DTYPES[settings.dtype]


def shard_size(weights: Mapping[str, torch.Tensor], settings: ExportConfig) -> int | str:
    """The most bytes of one file of weights: as set, or such that there are as many files as set.

    Args:
        weights: By name, in the order and the dtypes in which they are written.
        settings: ``max_shard_size`` and ``shards``.

    Raises:
        ConfigError: They do not divide into so many.
    """
    if settings.shards is None:
        return settings.max_shard_size
    sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in weights.values()]
    low, high = max(sizes), sum(sizes)  # files are filled in order: of a larger size there are as many or fewer
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _num_files(sizes, middle) <= settings.shards else (middle + 1, high)
    if _num_files(sizes, low) != settings.shards:
        raise ConfigError(
            f"export.shards={settings.shards}: the weights divide into {_num_files(sizes, low)} files like that; set "
            "so many, or export.max_shard_size"
        )
    return low


def _num_files(sizes: Sequence[int], most: int) -> int:
    count, filled = 1, 0
    for size in sizes:
        count, filled = (count + 1, size) if filled + size > most else (count, filled + size)
    return count


def is_quantised(transformer: Any) -> bool:
    """Whether diffusers loaded a transformer in a quantised format."""
    return getattr(transformer, "hf_quantizer", None) is not None


@torch.no_grad()
def cast(student: Any, dtype: torch.dtype) -> None:
    """Cast a transformer in place; what its class keeps in float32 (Wan's norms, for one) goes to float32.

    Args:
        student: A diffusers model.
        dtype: Of all other floating-point weights.
    """
    keep = set(getattr(student, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if keep & set(name.split(".")) else dtype)


def register_source(student: Any, plan: CompressionPlan, source: str) -> None:
    """Complete the provenance in a student's config: where it came from, by which plan, by which version.

    Args:
        student: Its config has the kept blocks under ``_ppcl``.
        plan: Its digest is kept.
        source: What the teacher was loaded from; of a folder the name alone is kept. The first teacher, whose blocks
            are named, is told instead where the teacher was compressed itself.
    """
    record = dict(student.config.get(RECORD) or {})
    first = next((former["source_model"] for former in record.get("rounds", ()) if "source_model" in former), None)
    params = plan.model.first_params if record.get("rounds") else plan.model.params
    record |= {
        "source_model": first or source_name(source),
        **({"source_params": params} if params else {}),
        "plan_sha256": plan_digest(plan),
        "ppcl_version": __version__,
    }
    student.register_to_config(**{RECORD: record})


def write_components(
    pipeline: Any, folder: Path | None, target: Path, link: bool = False, component: str = TRANSFORMER
) -> None:
    """Write every component of a pipeline but its transformer, and ``model_index.json``.

    A component that is not among the source's files is saved from memory. Only what the index
    names is taken along: a folder of a published model can hold the whole model again as one file.

    Args:
        pipeline: The teacher's pipeline.
        folder: Where its files are; None if they are not here.
        target: The new pipeline's folder; it exists.
        link: Link the weights where the file system allows, see ``WEIGHTS``; else they are copied, with a warning.
        component: The transformer that is left out.
    """
    if folder is None:
        pipeline.save_config(target)
        names = sorted({*pipeline.components} - {component})
    else:
        names, files = taken_along(folder, component)
        for file in files:
            shutil.copyfile(file, target / file.name)
    copied: list[Path] = []
    for name in names:
        part: Any = getattr(pipeline, name, None)
        if folder is not None and (folder / name).is_dir():
            copied += _take_along(folder / name, target / name, link)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(target / name)
            copied += [target / name] if link else []
    if copied:
        logger.warning("export.components=link: %s (%d in all) had to be written anew", copied[0], len(copied))


def check_source(model: str, component: str = TRANSFORMER) -> None:
    """Find what keeps a teacher's files from being exported, hours before they are.

    Raises:
        UserError: See :func:`taken_along`.
    """
    folder = stored_folder(model)
    if folder is not None:
        taken_along(folder, component)


def taken_along(folder: Path, component: str = TRANSFORMER) -> tuple[list[str], list[Path]]:
    """What of a teacher's folder goes into an exported pipeline.

    Returns:
        The names of its components but the transformer; files beside them.

    Raises:
        ModelError: A component's name is no name.
        ArtifactError: A link leads out of the folder.
    """
    index = read_json(folder / INDEX)
    check_names(folder / INDEX, index)
    of_parts = {name for name, value in index.items() if isinstance(value, list) and value and value[0]}
    names = sorted(of_parts - {component})
    beside = (file for pattern in TOP_LEVEL for file in sorted(folder.glob(pattern)) if file.is_file())
    files = [folder / INDEX, *beside]
    check_links([*files, *(folder / name for name in names)], real_places(folder))
    return names, files


def _take_along(folder: Path, target: Path, link: bool) -> list[Path]:
    """Copy a component's files, or link its weights; returns the weights that could not be linked.

    Of weights that are there as a variant alone the names become plain, so that loading need not name it.
    """
    copied = []
    kinds = {variant_of(file.name) for file in folder.glob("*.safetensors")}
    variant = f".{next(iter(kinds))}" if len(kinds) == 1 and None not in kinds else ""
    for file in _files(folder):
        place = (target / file.relative_to(folder)).with_name(file.name.replace(variant, "", 1))
        place.parent.mkdir(parents=True, exist_ok=True)
        if variant and f".index{variant}." in file.name:
            shards = {name: shard.replace(variant, "", 1) for name, shard in weight_map(file).items()}
            write_json(place, {**read_json(file), "weight_map": shards})
            continue
        wanted = link and file.suffix in WEIGHTS
        if not (wanted and link_file(file, place)):
            shutil.copyfile(file, place)
            copied += [file] if wanted else []
    return copied


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, hidden ones left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _check(folder: Path, kind: Any, variant: str | None) -> None:
    """Load the transformer as a user would and make sure that no weight is missing."""
    _, info = kind.from_pretrained(folder, variant=variant, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ArtifactError(f"the exported transformer does not match its config ({wrong[0]}); please report this")
