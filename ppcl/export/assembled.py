"""A teacher as a pipeline folder, put together from what people have: a file, a GGUF, a quantised folder, a LoRA.

What is compressed is a pipeline in a folder of plain weights, for blocks are read from it one by one. Here a
transformer of one's own is put beside the other components of a base pipeline: quantised weights are multiplied out,
LoRAs are folded in. The transformer is in memory once, as a whole.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ppcl.common.files import atomic_path, read_mapping, write_json
from ppcl.common.folders import check_apart, check_claim
from ppcl.common.tensor_files import read_tensor_header
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ConfigError, ModelError, UserError, shortened
from ppcl.export.pipeline import DTYPES, INDEX, hide_folders, write_components
from ppcl.export.text_encoders import trim_text_encoders
from ppcl.modules.remote_code import name_class
from ppcl.teacher.loading import (
    LOADING_ERRORS,
    check_complete,
    check_folder,
    check_model,
    component_entry,
    dtype_in,
    fetch_files,
    pipeline_class,
    read_index,
    source_name,
)
from ppcl.teacher.stored import QUANTISED, check_weight_names, is_quantised

logger = logging.getLogger(__name__)
PREFIX = "model.diffusion_model."  # of ComfyUI's and the original checkpoints


def assemble_teacher(
    model: str,
    out: Path,
    base: str | None = None,
    loras: Sequence[str] = (),
    scale: float = 1.0,
    dtype: str = "auto",
    trim: bool = False,
) -> Path:
    """Write a pipeline folder that can be compressed.

    Args:
        model: A transformer's folder, its single file (safetensors or GGUF); or a pipeline (folder, hub id) whose
            transformer is stored quantised, or gets a LoRA.
        out: The folder to write.
        base: The pipeline whose other components are taken, and whose class; ``model`` itself if None.
        loras: Files or hub ids of LoRAs, which are folded into the transformer's weights.
        scale: Of the LoRAs.
        dtype: Of the transformer's weights; ``auto``: as they are stored, those that are quantised bfloat16.
        trim: Leave out layers of the text encoders that no embedding depends on
            (:func:`ppcl.export.text_encoders.trim_text_encoders`).

    Returns:
        ``out``.

    Raises:
        ConfigError: Nothing is to be done, or there is no base.
        ModelError: The transformer cannot be loaded, does not fit the base, or weights are missing.
        UserError: A LoRA does not fit, or the folder cannot be written.
    """
    if dtype not in DTYPES and dtype != "auto":
        raise ConfigError(f"--dtype {dtype} is none of auto, {', '.join(DTYPES)}")
    place = Path(model)
    is_pipeline = not place.exists() or (place / INDEX).is_file()
    if base is None and not is_pipeline:
        raise ConfigError(f"{model} is a transformer alone; name the pipeline that it belongs to with --base")
    if base is not None and is_pipeline:
        raise ConfigError(f"{model} is a pipeline of its own; leave --base out, or give its transformer folder")
    source = _base_folder(base or model, is_quantised=is_pipeline)
    check_apart(out, [source, *([place] if place.is_dir() else [])])
    check_claim(out, INDEX, "a pipeline")
    transformer = None
    if not (is_pipeline and trim and not loras and dtype == "auto" and not is_quantised(source)):
        transformer = _transformer(model, source, is_pipeline, loras, scale, dtype, trim)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        write_components(None, source, temporary, component="" if transformer is None else TRANSFORMER)
        if transformer is not None:
            transformer.save_pretrained(temporary / TRANSFORMER)
            config = temporary / TRANSFORMER / "config.json"
            write_json(config, {key: value for key, value in read_mapping(config).items() if key != QUANTISED})
            name_class(temporary, type(transformer).__name__, False)
        if trim:
            _trim(temporary)
        hide_folders(temporary, source_name(base or model))
        check_folder(temporary)
    return out


def _transformer(
    model: str, source: Path, is_pipeline: bool, loras: Sequence[str], scale: float, dtype: str, trim: bool
) -> Any:
    """The transformer of plain weights, with LoRAs folded in."""
    with _one_line(
        f"the transformer of {model} cannot be loaded", ModelError, "check the file, and that it is of --base"
    ):
        transformer = _load(source / TRANSFORMER if is_pipeline else Path(model), source, DTYPES.get(dtype))
    was_plain = not _multiply_out(transformer)
    if is_pipeline and was_plain and not loras and not trim:
        raise ConfigError(
            f"{model} is a pipeline of plain weights already; compress it as it is, or add --lora or "
            "--trim-text-encoders"
        )
    _check_weights(model, transformer)
    for lora in loras:
        _fold(transformer, source, lora, scale)
    _say_differences(transformer, source)
    return transformer


def _trim(folder: Path) -> None:
    """Make the text encoders shorter, and say what became of them."""
    shorter = trim_text_encoders(folder)
    for name, (before, after) in shorter.items():
        logger.warning("%s: %d of %d layers are read; the others are left out", name, after, before)
    if not shorter:
        logger.warning("all layers of the text encoders are read: they stay as they are")


def _base_folder(base: str, is_quantised: bool) -> Path:
    """The folder of the base pipeline; its transformer may be quantised where it is the one that is taken."""
    if not is_quantised or not Path(base).is_dir():
        check_model(base)
    return fetch_files(base)


@contextmanager
def _one_line(what: str, kind: type[UserError], remedy: str) -> Iterator[None]:
    """Tell what a library raises as one line."""
    try:
        yield
    except UserError:
        raise
    except (*LOADING_ERRORS, NotImplementedError, AssertionError) as error:
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise kind(f"{what}: {reason}; {remedy}") from error


def _load(place: Path, source: Path, dtype: torch.dtype | None) -> Any:
    """Load a transformer of the class that the base pipeline's index names."""
    import diffusers

    library, name = component_entry(source, TRANSFORMER)
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(f"{source} has a transformer of {library}.{name}; ppcl takes those of diffusers")
    if place.is_dir():
        return kind.from_pretrained(place, dtype=dtype or dtype_in(place) or torch.bfloat16, use_safetensors=True)
    if not hasattr(kind, "from_single_file"):
        raise ModelError(f"diffusers reads no single file of {name}; save the transformer as a folder first")
    with torch.device("meta"):
        expected = kind.from_config(kind.load_config(source / TRANSFORMER)).state_dict()
    options: dict[str, Any] = {"config": str(source), "subfolder": "transformer"}
    if place.suffix == ".gguf":
        from diffusers import GGUFQuantizationConfig

        _check_size(place, _size_of_gguf(place), expected)
        dtype = dtype or torch.bfloat16
        return kind.from_single_file(
            str(place), dtype=dtype, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), **options
        )
    header = read_tensor_header(place)
    check_weight_names(place, header)
    # of a checkpoint with everything in it the transformer alone; diffusers strips this of some families' names only
    names = [name for name in header if name.startswith(PREFIX)] or list(header)
    _check_size(place, sum(math.prod(header[name]["shape"]) for name in names), expected)
    with safe_open(place, "pt") as file:
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    return kind.from_single_file(tensors, dtype=dtype or dtype_in(source / TRANSFORMER), **options)


def _size_of_gguf(path: Path) -> int:
    """Numbers in a GGUF file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(str(path)).tensors)


def _check_size(path: Path, size: int, expected: Mapping[str, Tensor]) -> None:
    """Refuse a file that is not the model of the base's config: diffusers passes over what is too much in silence."""
    wanted = sum(tensor.numel() for tensor in expected.values())
    if abs(size - wanted) > 0.005 * wanted:
        raise ModelError(
            f"{path} holds {size / 1e6:.4g}M parameters, and the base's transformer {wanted / 1e6:.4g}M; give the base "
            "that it was made from, or fetch the file again"
        )


def _multiply_out(transformer: Any) -> bool:
    """Turn quantised weights into plain ones, in place; returns whether there were any."""
    if getattr(transformer, "hf_quantizer", None) is None:
        return False
    with _one_line("the transformer's weights cannot be multiplied out", ModelError, "give them in bf16 or fp16"):
        transformer.dequantize()
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter.data) is not Tensor and hasattr(parameter.data, "dequantize"):  # torchao's
                setattr(module, name, nn.Parameter(parameter.data.dequantize(), requires_grad=False))
    return True


def _check_weights(model: str, transformer: Any) -> None:
    """Refuse a transformer with weights that are in no file, or that are no plain floating-point numbers."""
    if Path(model).is_dir():
        check_complete(model, transformer)
    wrong = [name for name, tensor in transformer.named_parameters() if not tensor.is_floating_point()]
    if wrong:
        raise ModelError(f"'{wrong[0]}' of {model} stays quantised; give the transformer in bf16 or fp16")


def _fold(transformer: Any, source: Path, lora: str, scale: float) -> None:
    """Fold a LoRA into a transformer's weights.

    Raises:
        UserError: It is none of this transformer.
    """
    kind: Any = pipeline_class(str(source))
    if not hasattr(kind, "lora_state_dict"):
        raise UserError(
            f"diffusers loads no LoRA into {read_index(source).get('_class_name')}; fold it in where it was trained"
        )
    with _one_line(f"the LoRA {lora} cannot be folded in", UserError, "check that it was made for this model"):
        found = kind.lora_state_dict(lora)
        tensors: Mapping[str, Tensor] = found[0] if isinstance(found, tuple) else found
        own = {key: tensor for key, tensor in tensors.items() if key.startswith("transformer.")}
        modules = {key.removeprefix("transformer.").split(".lora_")[0] for key in own}
        there = dict(transformer.named_modules())
        if strange := sorted(modules - there.keys()):
            raise UserError(f"the LoRA {lora} is of '{strange[0]}', which this transformer does not have")
        if not own:
            raise UserError(f"the LoRA {lora} has nothing for the transformer (but {next(iter(tensors), 'no tensor')})")
        if rest := len(tensors) - len(own):
            logger.warning("%s: %d tensors for other components (text encoders) are left out", lora, rest)
        kind.load_lora_into_transformer(own, transformer=transformer)
        transformer.fuse_lora(lora_scale=scale)
        transformer.unload_lora()


def _say_differences(transformer: Any, source: Path) -> None:
    """Say where the config is another one than the base's."""
    base = read_mapping(source / TRANSFORMER / "config.json", ModelError)
    ours = {key: value for key, value in transformer.config.items() if not key.startswith("_") and key != QUANTISED}
    known = json.loads(json.dumps(ours, default=str))
    words = [f"{key} {base[key]} -> {value}" for key, value in known.items() if key in base and base[key] != value]
    if words:
        logger.warning("the config is another one than the base's: %s", ", ".join(words))
