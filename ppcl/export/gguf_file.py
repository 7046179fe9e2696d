"""GGUF files: matrices of the blocks in 16 bits or fewer, all else in float32, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.common.files import atomic_path
from ppcl.common.tensor_files import Unread
from ppcl.errors import ConfigError, UserError, nearest

# What the package can write and both ComfyUI-GGUF and diffusers can read
TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
_SMALL = 1024  # elements; such tensors stay float32, as llama.cpp's own conversions have it
_LONGEST_NAME = 127
_HALF_MAX = 65504.0


def package() -> Any:
    """The ``gguf`` package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "--format gguf needs the gguf package, which is not there: pip install 'ppcl[gguf]'"
        ) from None
    return gguf


def check_type(kind: str) -> str:
    """The name of a type as the package spells it.

    Raises:
        ConfigError: It cannot be written.
    """
    name = kind.upper()
    if name in TYPES:
        return name
    if "_K" in name or name.startswith("IQ"):
        raise ConfigError(
            f"--gguf-type {kind}: the gguf package reads it but cannot write it; write F16, then llama-quantize with "
            f"ComfyUI-GGUF's patch makes {name} of it"
        )
    raise ConfigError(f"--gguf-type {kind} is unknown{nearest(name, TYPES)}; one of {', '.join(TYPES)}")


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Unread],
    matrices: Collection[str],
    kind: str,
    metadata: Mapping[str, str],
) -> None:
    """Write a GGUF file, whole or not at all.

    Args:
        path: The file.
        architecture: ``general.architecture``.
        tensors: By name.
        matrices: Names of those that are written as ``kind``; (o, d) each. Where d does not divide into the type's
            blocks they are F16.
        kind: One of ``TYPES``.
        metadata: Goes to ``general.license`` and the like where the format has a field, else to ``ppcl.*``.

    Raises:
        UserError: A weight does not fit into 16 bits, or the file cannot be written.
    """
    gguf = package()
    types = {name: _type_of(gguf, tensor, name in matrices, kind) for name, tensor in tensors.items()}
    long = next((name for name in tensors if len(name) > _LONGEST_NAME), None)
    if long is not None:
        raise UserError(f"{long} has {len(long)} characters, GGUF takes {_LONGEST_NAME}; write another --format")
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
            for key, text in metadata.items():
                field = {"license", "license_name", "license_link"} & {key}
                writer.add_string(f"general.{key.replace('_', '.')}" if field else f"ppcl.{key}", text)
            for name, tensor in tensors.items():
                writer.add_tensor_info(
                    name, tensor.shape, torch.empty(0).numpy().dtype, _bytes(gguf, tensor, types[name]), types[name]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                writer.write_tensor_data(
                    gguf.quants.quantize(_readable(name, tensor.read(), types[name].name), types[name])
                )
        finally:
            writer.close()


def _type_of(gguf: Any, tensor: Unread, is_matrix: bool, kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if not is_matrix or len(tensor.shape) != 2 or tensor.shape[0] * tensor.shape[1] <= _SMALL:
        return types.F32
    block, _ = gguf.GGML_QUANT_SIZES[types[kind]]
    return types.F16 if tensor.shape[1] % block else types[kind]


def _bytes(gguf: Any, tensor: Unread, kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(torch.Size(tensor.shape).numel() // block * size)


def _readable(name: str, tensor: Tensor, kind: str) -> Any:
    """A tensor as numpy's float32."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    if kind == "F16" and float(values.abs().max()) > _HALF_MAX:
        raise UserError(
            f"{name} has values up to {float(values.abs().max()):.3g}, F16 holds {_HALF_MAX:g}; --gguf-type BF16"
        )
    return values.numpy()
