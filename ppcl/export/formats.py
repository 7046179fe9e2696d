"""Writing a finished pipeline's transformer for other programs; which formats it has: :mod:`ppcl.export.support`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.files import atomic_path, read_json, write_text
from ppcl.common.folders import check_apart
from ppcl.common.outside import check_links, real_places
from ppcl.common.tables import plain
from ppcl.common.tensor_files import Unread, weights_variant, write_one_by_one
from ppcl.config import ExportConfig
from ppcl.errors import ArtifactError, ConfigError, ModelError, nearest
from ppcl.export.card import PLACEHOLDER, source_licence
from ppcl.export.gguf_file import check_type, package, write_gguf
from ppcl.export.layouts import LAYOUTS
from ppcl.export.pipeline import INDEX, hide_folders, write_components
from ppcl.export.stock import StockTransformer, open_stock, stock_class_name
from ppcl.export.streamed import write_weights
from ppcl.export.support import GGUF_ARCHITECTURES, SUFFIXES, refusal, single_file_classes
from ppcl.modules.remote_code import name_class
from ppcl.teacher.loading import loading_arguments
from ppcl.teacher.stored import components

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What :func:`export_as` wrote.

    Attributes:
        path: The file or folder.
        parameters: Of the transformer, in stock shapes.
        multiplied_out: How many modules were smaller.
        load: How diffusers loads it; empty where another program does.
    """

    path: Path
    parameters: int
    multiplied_out: int
    load: str = ""


def export_as(source: str | Path, out: Path, kind: str, gguf_type: str = "F16") -> Written:
    """Write the transformer of a finished pipeline for other programs, one weight in memory at a time.

    Args:
        source: A run directory, or a diffusers pipeline folder.
        out: The file, or for ``diffusers`` the folder; must not exist.
        kind: The format.
        gguf_type: What GGUF has the blocks' matrices in.

    Raises:
        ConfigError: The format or type is unknown, or ``out`` has another suffix.
        ModelError: There is no pipeline, or the format cannot hold its transformer.
        ArtifactError: ``out`` is there already, or weights are missing.
        UserError: The file cannot be written.
    """
    if kind not in SUFFIXES:
        raise ConfigError(f"--format {kind} is unknown{nearest(kind, SUFFIXES)}; one of {', '.join(SUFFIXES)}")
    if out.suffix != SUFFIXES[kind] and SUFFIXES[kind]:
        raise ConfigError(f"--format {kind} writes a {SUFFIXES[kind]} file, got --out {out}; loaders go by the name")
    if kind == "gguf":
        gguf_type = check_type(gguf_type)
        package()
    folder = _pipeline_of(Path(source))
    if out.exists() or out.is_symlink():
        raise ArtifactError(f"{out} is already there; choose another --out or delete it")
    check_apart(out, [folder])
    name = stock_class_name(folder)
    why = refusal(kind, name, read_json(folder / "transformer" / "config.json"))
    if why:
        raise ModelError(f"{name} as {kind}: {why}")
    stock = open_stock(folder)
    others = [key for key in components(folder) if key.startswith("transformer_")]
    if others and kind != "diffusers":
        logger.warning("%s has a %s too, which is a model of its own and not in this file", folder, others[0])
    load = ""
    if kind == "diffusers":
        _write_pipeline(stock, folder, out)
    elif kind == "gguf":
        tensors = _arranged(stock)
        matrices = {theirs for theirs, parts in _names(stock).items() if all(_is_matrix(stock.model, p) for p in parts)}
        write_gguf(out, GGUF_ARCHITECTURES[name], tensors, matrices, gguf_type, _provenance(stock, folder))
        load = _loading(name, out, folder, ", quantization_config=GGUFQuantizationConfig()")
    else:
        tensors = _arranged(stock) if kind == "comfyui" or _diffusers_converts(stock) else stock.tensors
        write_one_by_one(out, tensors, {"format": "pt", **_provenance(stock, folder)})
        load = _loading(name, out, folder) if kind == "single-file" else ""
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in stock.tensors.values())
    return Written(out, parameters, len(stock.multiplied_out), load)


def _pipeline_of(source: Path) -> Path:
    """The pipeline folder of a run, or the folder itself."""
    if (source / "stages.json").is_file():
        if not (source / "pipeline" / INDEX).is_file():
            raise ArtifactError(f"{source} is a run without a pipeline yet; run it to its end first, as it was started")
        return source / "pipeline"
    if not source.is_dir():
        raise ModelError(f"{source} is no folder; --format converts what is written: give a run or a pipeline folder")
    return source


def _names(stock: StockTransformer) -> dict[str, tuple[str, ...]]:
    """Other programs' names, each with the weights that lie in it."""
    layout = LAYOUTS.get(stock.name)
    return layout.arranged(stock.tensors) if layout else {name: (name,) for name in stock.tensors}


def _arranged(stock: StockTransformer) -> dict[str, Unread]:
    """The weights as other programs name and join them."""
    tensors = {}
    for theirs, parts in _names(stock).items():
        pieces = [stock.tensors[part] for part in parts]
        if stock.name in LAYOUTS and _is_scale_and_shift(stock.model, parts[0]):
            pieces = [Unread(p.shape, p.dtype, partial(_swapped, p.read)) for p in pieces]
        tensors[theirs] = _joined(pieces)
    return tensors


def _joined(pieces: list[Unread]) -> Unread:
    """Tensors one below the other."""
    if len(pieces) == 1:
        return pieces[0]
    rows = sum(piece.shape[0] for piece in pieces)

    def read() -> Tensor:
        return torch.cat([piece.read() for piece in pieces])

    return Unread((rows, *pieces[0].shape[1:]), pieces[0].dtype, read)


def _is_scale_and_shift(model: Any, name: str) -> bool:
    """Whether a weight makes scale and shift, which the models' own releases have the other way round."""
    from diffusers.models.normalization import AdaLayerNormContinuous

    return isinstance(model.get_submodule(name.rpartition(".linear.")[0]), AdaLayerNormContinuous)


def _swapped(read: Callable[[], Tensor]) -> Tensor:
    return torch.cat(read().chunk(2)[::-1])


def _is_matrix(model: Any, name: str) -> bool:
    """Whether a weight is a linear layer's inside the blocks."""
    module, _, parameter = name.rpartition(".")
    in_blocks = isinstance(getattr(model, name.partition(".")[0], None), nn.ModuleList)
    return parameter == "weight" and in_blocks and isinstance(model.get_submodule(module), nn.Linear)


def _diffusers_converts(stock: StockTransformer) -> bool:
    """Whether diffusers' own conversion makes the transformer of the names of the model's release.

    Some of its conversions take a model's published width for granted; diffusers' own names load at any.
    """
    if stock.name not in LAYOUTS:
        return False
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in _arranged(stock).items()}
    try:
        found = single_file_classes()[stock.name]["checkpoint_mapping_fn"](
            checkpoint=shapes, config=dict(stock.model.config)
        )
    except (KeyError, IndexError, RuntimeError, ValueError):
        return False
    expected = {name: torch.Size(tensor.shape) for name, tensor in stock.tensors.items()}
    return {name: tensor.shape for name, tensor in found.items()} == expected


def _provenance(stock: StockTransformer, folder: Path) -> dict[str, str]:
    """What a file says of itself, as text by name."""
    facts = {"source_model": "", "plan_sha256": "", "ppcl_version": ""}
    facts = {key: str(stock.provenance.get(key, "")) for key in facts}
    if "kept_blocks" in stock.provenance:
        facts["kept_blocks"] = json.dumps(stock.provenance["kept_blocks"])
    if stock.multiplied_out:
        facts["multiplied_out"] = json.dumps(stock.multiplied_out)
    return {key: text for key, text in {**facts, **source_licence(str(folder))}.items() if text}


def _loading(name: str, out: Path, folder: Path, more: str = "") -> str:
    return f'{name}.from_single_file("{out}", config="{folder}", subfolder="transformer"{more})'


def _write_pipeline(stock: StockTransformer, folder: Path, out: Path) -> None:
    """Write a pipeline folder with the transformer in stock shapes."""
    with atomic_path(out) as temporary:
        temporary.mkdir()
        write_components(None, folder, temporary)
        read: Callable[[str], Tensor] = lambda name: stock.tensors[name].read()  # noqa: E731
        settings = ExportConfig(variant=weights_variant(folder))  # type: ignore[call-arg]
        write_weights(stock.model, read, temporary / "transformer", settings)
        name_class(temporary, stock.name, remote=False)
        card = folder / "README.md"
        if not stock.multiplied_out and card.is_file():
            check_links([card], real_places(folder))
            shutil.copyfile(card, temporary / "README.md")
        else:
            write_text(temporary / "README.md", _card(stock, folder, loading_arguments(temporary)))
        hide_folders(temporary, str(stock.provenance.get("source_model") or folder.resolve().name))


def _card(stock: StockTransformer, folder: Path, arguments: str) -> str:
    """The card of a pipeline whose modules were multiplied out: that of the smaller one tells another story."""
    from huggingface_hub import ModelCardData

    licence: dict[str, Any] = source_licence(str(folder))
    data = ModelCardData(library_name="diffusers", tags=["diffusers", "ppcl", "compressed"], **licence)
    source = plain(str(stock.provenance.get("source_model", "its teacher")))
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in stock.tensors.values())
    loading = f'DiffusionPipeline.from_pretrained("{PLACEHOLDER}"{arguments})'
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {source}, with fewer blocks\n\nCompressed by ppcl from `{source}`: "
        f"{parameters:,} parameters in the transformer, of stock classes. {len(stock.multiplied_out)} modules that "
        "were smaller are in their usual shapes again, with the same results, so that any program loads them; what is "
        "saved is the depth alone. The kept blocks are listed in `transformer/config.json` under `_ppcl`.\n\n"
        f"```python\nfrom diffusers import DiffusionPipeline\n\npipe = {loading}\n```\n"
    )
