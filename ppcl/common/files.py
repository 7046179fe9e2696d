"""Reading and writing artifacts: atomic, checked, without pickle.

A file is written beside its final name and renamed, so a reader sees the old file or
the new one, never half of one. A folder is published the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.errors import ArtifactError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    Works for a file and for a folder that the block creates. A folder replaces an older one, a file never does. All
    files follow the user's umask.

    Raises:
        UserError: The place cannot be written (full disk, read-only folder), or a file is to go where a folder is.
    """
    path = Path(path)
    temporary = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _give_usual_modes(temporary)
        if path.is_dir() and not temporary.is_dir():
            raise OSError(errno.EISDIR, "a folder is there")
        if path.is_dir():
            _swap_folder(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --out"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _give_usual_modes(written: Path) -> None:
    """Let a file, or all of a folder, be as readable as the user's umask has new files be.

    Some libraries (safetensors) write through temporary files that only their owner may read.
    """
    probe = written.with_name(f".mode{written.name}")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
    usual = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    for path in [written, *(written.rglob("*") if written.is_dir() else ())]:
        status = path.lstat()
        # a file with another name (export.components=link) is not ours alone
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and stat.S_IMODE(status.st_mode) != usual:
            path.chmod(usual)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside a path, which nobody else gives to what is his."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}.ppcl")


def _swap_folder(new: Path, old: Path) -> None:
    """Replace folder ``old`` by ``new``; a crash in between leaves one of them in place."""
    retired = _beside(old, "old")
    old.rename(retired)
    new.rename(old)
    remove(retired)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link the link, never what it leads to.

    Raises:
        UserError: It cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}; choose another --out") from error


LEFTOVER = re.compile(r"\.(?P<name>.+)\.(tmp|old)-\d+\.ppcl")  # see atomic_path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically, with sorted keys so that equal data give equal bytes."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file, flush=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free some space and run again") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON artifact.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; run the stage that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it and run again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error


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


def read_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], Any]:
    """Read a safetensors artifact.

    Returns:
        The tensors by name, and the metadata given to :func:`write_tensors` (or None).

    Raises:
        ArtifactError: The file is missing, truncated or corrupted.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run the stage that writes it")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it and run again") from None
    return tensors, json.loads(header["ppcl"]) if "ppcl" in header else None


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors of safetensors files by name, each read when it is asked for; of equal names the last file's counts.

    Args:
        paths: The files; those that do not exist have no tensors.

    Raises:
        ArtifactError: A file is damaged.
    """

    def __init__(self, *paths: Path) -> None:
        headers = {path: read_tensor_header(path) for path in paths if path.is_file()}
        self._files = {name: path for path, header in headers.items() for name in header}
        self._entries = {name: entry for header in headers.values() for name, entry in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); delete it and run again") from None

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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it and run again") from None
    return json.loads(header["ppcl"]) if "ppcl" in header else None


def read_tensor_header(path: str | Path) -> dict[str, Any]:
    """Read the names, shapes and dtypes of a safetensors file without its data or torch.

    Raises:
        ArtifactError: The header is unreadable, or the file is shorter than it says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:  # also keeps a garbage length from allocating its memory
                raise ValueError(f"{size} bytes, the header alone should have {length}")
            header: dict[str, Any] = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; fetch or write it again") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it, then fetch or write it again") from None
    if size != expected:
        raise ArtifactError(
            f"{path} is truncated ({size} bytes, expected {expected}); delete it, then fetch or write it again"
        )
    header.pop("__metadata__", None)
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


def digest(*parts: Any) -> str:
    """Return a short SHA-256 of JSON-serialisable parts and of the content of Path parts."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            sha.update(file_digest(part).encode())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of every file of a folder with its relative name."""
    sha = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        sha.update(str(file.relative_to(path)).encode())
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    sha.update(chunk)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from error
    return sha.hexdigest()


def link_file(source: Path, place: Path) -> bool:
    """Make ``place`` another name of a file: a hard link, or else a relative symbolic link.

    A hard link outlives the source folder (and a cleaned cache). The relative path holds after
    the folder of ``place`` is renamed beside itself.

    Returns:
        Whether the file system allowed either.
    """
    real = source.resolve()  # files of the hub's cache are links themselves
    try:
        place.hardlink_to(real)
    except OSError:  # another file system, another owner, or no links at all
        try:
            place.symlink_to(os.path.relpath(real, place.parent.resolve()))
        except (OSError, ValueError):  # ValueError: another drive
            return False
    return True
