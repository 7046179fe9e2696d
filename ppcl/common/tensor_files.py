"""Safetensors files: written whole, one tensor at a time where they are large, read checked, known by their headers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.common.files import DELETE, atomic_path, digest, missing_remedy
from ppcl.common.reading import MOST_BYTES, parse_json
from ppcl.errors import ArtifactError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically; ``metadata`` is kept as one JSON string."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {"ppcl": json.dumps(metadata, sort_keys=True)} if metadata is not None else None
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=header)
        except SafetensorError as error:  # safetensors reports a full disk as its own error
            raise OSError(None, str(error)) from error


def safetensors_name(dtype: torch.dtype) -> str:
    """What a header of safetensors calls a dtype."""
    return _SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class Unread:
    """A tensor that is read when it is written.

    Attributes:
        shape: Its shape.
        dtype: What it is written in.
        read: Reads it.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_one_by_one(
    path: str | Path, tensors: Mapping[str, Unread], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically, with one of them in memory at a time.

    Args:
        path: The file.
        tensors: By name.
        metadata: As safetensors has it, text by name.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.dtype.itemsize * math.prod(tensor.shape)
        place = {"shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": safetensors_name(tensor.dtype), **place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()  # as safetensors itself writes it
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            values = tensor.read().detach()
            if tuple(values.shape) != tuple(tensor.shape):
                raise ValueError(f"{name} is of shape {tuple(values.shape)}, said was {tuple(tensor.shape)}")
            values = values.to("cpu", tensor.dtype).contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)


@contextlib.contextmanager
def open_tensors(
    path: str | Path,
    device: str = "cpu",
    error: type[UserError] = ArtifactError,
    remedy: str = DELETE,
    framework: str = "pt",
) -> Iterator[Any]:
    """Open a safetensors file; what is wrong with it, also while it is read, is said in one line.

    Args:
        path: The file.
        device: Where its tensors go.
        error: What is raised; an artifact's unless it is somebody else's file.
        remedy: What to do about a damaged one.
        framework: Of the tensors.

    Yields:
        What ``safetensors.safe_open`` yields.

    Raises:
        UserError: The file is missing, truncated or corrupted.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():  # a pipe would be waited for
        raise error(f"{path} does not exist; {missing_remedy(remedy)}")
    try:
        with safe_open(path, framework=framework, device=device) as file:
            yield file
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as reason:
        raise error(f"{path} is damaged ({reason}); {remedy}") from None


def metadata_of(file: Any, path: str | Path) -> Any:
    """The metadata given to :func:`write_tensors`, of an open file; None if there is none.

    Raises:
        ArtifactError: It is no mapping in JSON.
    """
    header = file.metadata() or {}
    if "ppcl" not in header:
        return None
    try:
        data = parse_json(header["ppcl"])
        if not isinstance(data, dict):
            raise ValueError(f"metadata of {type(data).__name__}")
        return data
    except ValueError as reason:
        raise ArtifactError(f"{path} is damaged ({reason}); delete it and run again") from None


def finite(tensor: Tensor, name: str, path: str | Path, masks: bool = False) -> Tensor:
    """Return a tensor that holds no NaN and nothing infinite.

    Args:
        tensor: Any; whole numbers are finite.
        name: Its name in the file.
        path: The file.
        masks: Let minus infinity pass, with which attention masks hide.

    Raises:
        ArtifactError: It does.
    """
    import torch

    if tensor.is_floating_point():
        wide = torch.float32 if tensor.device.type == "mps" else torch.float64
        total = float(tensor.sum(dtype=wide))  # one that is not finite is not lost in a sum, and no mask is made
        if not (math.isfinite(total) or (masks and total == -math.inf)):
            raise ArtifactError(f"{path} is damaged ('{name}' has values that are no numbers); delete it and run again")
    return tensor


def read_tensors(path: str | Path, device: str = "cpu", masks: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Read a safetensors artifact.

    Args:
        path: The file.
        device: Where the tensors go.
        masks: See :func:`finite`.

    Returns:
        The tensors by name, and the metadata given to :func:`write_tensors` (or None).

    Raises:
        ArtifactError: The file is missing, truncated or corrupted, or has values that are not finite.
    """
    with open_tensors(path, device) as file:
        tensors = {name: finite(file.get_tensor(name), name, path, masks) for name in file.keys()}  # noqa: SIM118
        return tensors, metadata_of(file, path)


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors of safetensors files by name, each read when it is asked for; of equal names the last file's counts.

    Args:
        paths: The files; those that do not exist have no tensors.

    Raises:
        ArtifactError: A file is damaged, or has not what it is asked for.
    """

    def __init__(self, *paths: Path) -> None:
        headers = {path: read_tensor_header(path) for path in paths if path.is_file()}
        self._files = {name: path for path, header in headers.items() for name in header}
        self._entries = {name: entry for header in headers.values() for name, entry in header.items()}
        self._given = " and ".join(map(str, paths))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ArtifactError(f"{self._given} has no '{name}'; delete it and run again")
        path = self._files[name]
        with open_tensors(path) as file:
            return finite(file.get_tensor(name), name, path)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def unread(self, name: str) -> Unread:
        """A tensor for :func:`write_one_by_one`."""
        import torch

        entry = self._entries[name]
        kind = next(dtype for dtype, stored in _SAFETENSORS_NAMES.items() if stored == entry["dtype"])
        return Unread(entry["shape"], getattr(torch, kind), lambda: self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_metadata(path: str | Path) -> Any:
    """The metadata given to :func:`write_tensors` (or None), without any tensor.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    with open_tensors(path) as file:
        return metadata_of(file, path)


def read_tensor_header(path: str | Path) -> dict[str, Any]:
    """Read the names, shapes and dtypes of a safetensors file without its data or torch.

    Raises:
        ArtifactError: The header is unreadable, or the file is shorter than it says.
    """
    header = _whole_header(Path(path))
    header.pop("__metadata__", None)
    return header


def header_digest(path: str | Path) -> str:
    """Identify all of a safetensors file but the numbers in it: names, shapes, dtypes, metadata.

    Raises:
        ArtifactError: See :func:`read_tensor_header`.
    """
    return digest(_whole_header(Path(path)))


def _whole_header(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() and path.exists():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MOST_BYTES):  # also keeps a garbage length from allocating its memory
                raise ValueError(f"{size} bytes, the header alone should have {length}")
            header: dict[str, Any] = parse_json(file.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        for entry in entries:
            begin, end = entry["data_offsets"]
            sound = isinstance(entry["dtype"], str) and all(n >= 0 for n in (begin, end - begin, *entry["shape"]))
            if not sound:
                raise ValueError(f"an entry {str(entry)[:100]}")
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; fetch or write it again") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it, then fetch or write it again") from None
    if size != expected:
        raise ArtifactError(
            f"{path} is truncated ({size} bytes, expected {expected}); delete it, then fetch or write it again"
        )
    return header


_WEIGHTS_NAME = re.compile(r"[\w-]+?(-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?\.safetensors")


def variant_of(name: str) -> str | None:
    """The variant in a weight file's name: ``fp16`` of ``model.fp16-00001-of-00002.safetensors``; or None."""
    match = _WEIGHTS_NAME.fullmatch(name)
    return match["variant"] if match else None


def weights_variant(pipeline: str | Path) -> str | None:
    """The ``variant`` that loading a pipeline folder needs: None where all components have files without one."""
    return needed_variant(str(file.relative_to(pipeline)) for file in Path(pipeline).glob("*/*.safetensors"))


def needed_variant(names: Iterable[str]) -> str | None:
    """The same by names of files, ``vae/diffusion_pytorch_model.fp16.safetensors``: what most that need one have."""
    variants: dict[str, set[str | None]] = {}
    for name in names:
        place, _, file = name.rpartition("/")
        if place and "/" not in place and file.endswith(".safetensors"):
            variants.setdefault(place, set()).add(variant_of(file))
    needed = sorted(kind for kinds in variants.values() if None not in kinds for kind in kinds if kind)
    return max(needed, key=needed.count, default=None)
