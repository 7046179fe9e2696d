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
from typing import TYPE_CHECKING, Any, TypeVar

from ppcl.common.reading import MOST_BYTES, MOST_YAML, parse_json, parse_yaml, read_bytes
from ppcl.errors import ArtifactError, UserError, shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
DELETE = "delete it and run again"

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


def read_json(path: str | Path, error: type[UserError] = ArtifactError, remedy: str = DELETE) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: What is raised; an artifact's unless it is somebody else's file.
        remedy: What to do about a damaged one.

    Raises:
        UserError: The file is missing or damaged, too large or nested too deep, or not a regular file.
    """
    return _parsed(Path(path), parse_json, error, remedy, MOST_BYTES)


def read_mapping(path: str | Path, error: type[UserError] = ArtifactError, remedy: str = DELETE) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; see :func:`read_json`."""
    return _mapping(read_json(path, error, remedy), Path(path), error, remedy)


def read_yaml(path: str | Path, error: type[UserError] = ArtifactError, remedy: str = DELETE) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty one is one, too. See :func:`read_json`."""
    data = _parsed(Path(path), lambda content: parse_yaml(content.decode("utf-8-sig")), error, remedy, MOST_YAML)
    return _mapping({} if data is None else data, Path(path), error, remedy)


def read_text(path: Path, error: type[UserError], remedy: str, most: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8, with a byte order mark or without; see :func:`read_json`."""
    return _parsed(path, lambda content: content.decode("utf-8-sig"), error, remedy, most)


def _parsed(path: Path, parse: Callable[[bytes], T], error: type[UserError], remedy: str, most: int) -> T:
    try:
        return parse(read_bytes(path, most))
    except FileNotFoundError:
        raise error(f"{path} does not exist; {_again(remedy)}") from None
    except ValueError as reason:  # of Unicode and of JSON, too
        raise error(f"{path} is damaged ({shortened(reason)}); {remedy}") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}; {remedy}") from None


def _again(remedy: str) -> str:
    """What to do about a file that is not there: it cannot be deleted."""
    return "run the stage that writes it" if remedy == DELETE else remedy


def _mapping(data: Any, path: Path, error: type[UserError], remedy: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise error(f"{path} is damaged (a {type(data).__name__}, not a mapping); {remedy}")
    return data


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
        raise error(f"{path} does not exist; {_again(remedy)}")
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


def share_folder(source: Path, place: Path) -> None:
    """Make ``place`` a folder of the same files, which nobody changes: links, or copies where there are none."""
    with atomic_path(place) as temporary:
        temporary.mkdir()
        for file in sorted(source.iterdir()):
            if not link_file(file, temporary / file.name):
                shutil.copyfile(file, temporary / file.name)


def link_file(source: Path, place: Path) -> bool:
    """Make ``place`` another name of a file: a hard link, which outlives the source folder (and a cleaned cache).

    Returns:
        Whether the file system allowed it.
    """
    try:
        place.hardlink_to(source.resolve())  # files of the hub's cache are links themselves
    except OSError:  # another file system, another owner, or no links at all
        return False
    return True
