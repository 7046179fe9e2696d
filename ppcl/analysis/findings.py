"""What a sweep finds out about each block, on disk as soon as the block leaves; read back a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.common.tensor_files import open_tensors, read_metadata, read_tensor_header, write_tensors
from ppcl.teacher.blocks import Place


class Findings:
    """A file for each block and kind of finding.

    Args:
        folder: The sweep's: what is here goes when the sweep begins anew, and when it is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, place: Place, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write what was found about a block."""
        write_tensors(self.path(kind, place), tensors, numbers)

    def numbers(self, kind: str, place: Place) -> Any:
        """The numbers of a finding."""
        return read_metadata(self.path(kind, place))

    def tensors(self, kind: str, place: Place, *names: str) -> list[Tensor]:
        """Some tensors of a finding; nothing else is read."""
        with open_tensors(self.path(kind, place)) as file:
            return [file.get_tensor(name).clone() for name in names]

    def shapes(self, kind: str, place: Place) -> dict[str, list[int]]:
        """The shape of each tensor of a finding."""
        return {name: entry["shape"] for name, entry in read_tensor_header(self.path(kind, place)).items()}

    def path(self, kind: str, place: Place) -> Path:
        """The file of a finding."""
        return self.folder / f"{kind}-{place[0]}-{place[1]}.safetensors"
