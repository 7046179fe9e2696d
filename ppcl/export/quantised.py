"""A student in 8 or 4 bits, made and written by diffusers' own quantisation, so that plain diffusers loads it.

Which layers: :mod:`ppcl.student.stored_size`. Written are safetensors alone: torchao's tensors lie in them in parts,
their kinds in the file's metadata.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.optional import optional_module
from ppcl.config.names import Quantize
from ppcl.errors import UserError
from ppcl.export.pipeline import cast, is_quantised
from ppcl.student.stored_size import REST, group_of, layers_of
from ppcl.teacher.block_map import RECORD
from ppcl.teacher.families import adapter_for

ON_CUDA = ("int4", "nf4")  # torchao packs int4 there alone, and diffusers refuses bitsandbytes elsewhere
_CONFIGS = {  # of torchao: module and class
    "int8": ("torchao.quantization", "Int8WeightOnlyConfig"),
    "fp8": ("torchao.quantization", "Float8WeightOnlyConfig"),
    "nvfp4": ("torchao.prototype.mx_formats", "NVFP4WeightOnlyConfig"),
    "int4": ("torchao.quantization", "Int4WeightOnlyConfig"),
}


def check_quantize(kind: Quantize, device: torch.device) -> None:
    """Refuse a format that cannot be made here; called before anything is done.

    Raises:
        UserError: Its package is missing or too old, or the device is none of its.
    """
    if kind == "none":
        return
    setting = f"export.quantize={kind}"
    here = "use nvfp4 (4.5 bits) or int8, which any device makes and runs"
    if kind in ON_CUDA and device.type != "cuda":
        raise UserError(f"{setting} needs a CUDA device, and this run is on {device.type}; {here}")
    if kind == "nf4":
        optional_module("bitsandbytes", setting, "nf4", here)
        return
    module, name = _CONFIGS[kind]
    support = optional_module("torchao.prototype.safetensors.safetensors_utils", setting, "int8")
    known = {"int8": "Int8Tensor", "fp8": "Float8Tensor", "nvfp4": "NVFP4Tensor", "int4": "Int4Tensor"}[kind]
    if known not in support.ALLOWED_TENSORS_SUBCLASSES or not hasattr(optional_module(module, setting, "int8"), name):
        raise UserError(f"{setting}: this torchao cannot write it as safetensors; pip install --upgrade torchao")
    if kind == "int4" and importlib.util.find_spec("mslk") is None:
        raise UserError(f"{setting} needs the package mslk, which is not installed; pip install mslk-cuda, or {here}")


def quantised(student: Any, kind: Quantize, scratch: Path, device: torch.device) -> Any:
    """A student as diffusers quantises it.

    Args:
        student: Cast to bfloat16 in place.
        kind: The format.
        scratch: A folder in which its plain weights lie meanwhile.
        device: Where the formats are made that need a device.

    Raises:
        UserError: It is quantised already, or the format takes none of its layers.
    """
    if is_quantised(student):
        raise UserError(f"export.quantize={kind}: the transformer is quantised already; give it in bf16 or fp16")
    layers = layers_of(student, adapter_for(student), kind)
    if not layers:
        raise UserError(f"export.quantize={kind} takes no layer of this transformer (their sizes); use int8")
    config = _bitsandbytes(student, layers) if kind == "nf4" else _torchao(student, layers, kind)
    cast(student, REST)
    place = {"device_map": str(device)} if kind in ON_CUDA else {}
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        student.save_pretrained(folder)
        made = type(student).from_pretrained(folder, quantization_config=config, dtype=REST, **place)
    made.register_to_config(**{RECORD: {**(made.config.get(RECORD) or {}), "quantised": {"format": kind}}})
    return made.eval().requires_grad_(False)


def _torchao(student: Any, layers: Mapping[str, nn.Linear], kind: Quantize) -> Any:
    """Diffusers' config for torchao.

    By full names and patterns of them: ``modules_to_not_convert`` looks for parts of names, and would leave out a
    block's ``proj_out`` with the model's.
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import FqnToConfig

    module, name = _CONFIGS[kind]
    make = getattr(importlib.import_module(module), name)
    options: dict[str, Any] = {} if kind == "nvfp4" else {"set_inductor_config": False}  # it is the process's
    if kind == "int8":
        options["version"] = 2  # whose tensors safetensors take; torchao 0.17 makes older ones where nobody asks
    stacks = sorted({path.partition(".")[0] for path in layers})
    inside = re.compile(f"(?:{'|'.join(stacks)})\\..+")
    linear = [path for path, m in student.named_modules() if isinstance(m, nn.Linear) and inside.fullmatch(path)]
    entries: dict[str, Any] = {path: None for path in linear if path not in layers}
    if kind == "int4":
        groups = {path: group_of(layer.in_features) for path, layer in layers.items()}
        entries |= {path: make(group_size=group, **options) for path, group in groups.items()}
    else:
        entries[f"re:{inside.pattern}"] = make(**options)
    return TorchAoConfig(FqnToConfig(entries))


def _bitsandbytes(student: Any, layers: Mapping[str, nn.Linear]) -> Any:
    """Diffusers' config for bitsandbytes."""
    from diffusers import BitsAndBytesConfig

    kept = [path for path, m in student.named_modules() if isinstance(m, nn.Linear) and path not in layers]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=REST,
        llm_int8_skip_modules=kept,
    )


@torch.no_grad()
def multiplied_out(transformer: Any, kind: Quantize) -> dict[str, Tensor]:
    """What the quantised weights of a transformer stand for, by name, in bfloat16."""
    layers = layers_of(transformer, adapter_for(transformer), kind)  # of bitsandbytes' own class by now
    if kind == "nf4":
        import bitsandbytes as bnb

        packed = {path: m.weight for path, m in transformer.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        out = bnb.functional.dequantize_4bit
        return {f"{path}.weight": out(w.data, w.quant_state).to(REST) for path, w in packed.items()}
    return {f"{path}.weight": layer.weight.dequantize() for path, layer in layers.items()}


@torch.no_grad()
def put_back(transformer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put recovered tensors into a quantised transformer, in the dtypes that it has."""
    parameters = dict(transformer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
