"""The machine that a run is estimated for: given as text, or the one at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ppcl.errors import UserError

SHARE = 0.4  # of the peak that whole transformers reach; the rest is waiting for memory
DISK = 2e9  # bytes a second
CACHED = 20e9  # bytes a second of files that the system keeps in RAM
FREE = 0.8  # of RAM that such files may take
CONTEXT = 1e9  # bytes that a GPU's driver, its libraries and their workspaces take
PROGRAM = 2e9  # bytes of RAM that Python, torch and diffusers take

# half-precision FLOP/s at their peak, without zeros, by a part of the name
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 362e12, "4090": 165e12, "3090": 71e12}
CUDA_PEAK = 150e12  # of a GPU that is not named above
CPU_PEAK = 0.15e12  # of a thread
EXAMPLE = '--device "24GB,300TFLOPS"'


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        kind: ``cuda`` or ``cpu``: there RAM is the device's memory.
        memory: Bytes of one device.
        peak: FLOP/s of one device in half precision.
        count: Devices, each with a process of its own.
        ram: Bytes of RAM; None: not known.
        disk: Bytes a second that are read from the disk, or written.
    """

    kind: str
    memory: float
    peak: float
    count: int = 1
    ram: float | None = None
    disk: float = DISK

    @property
    def speed(self) -> float:
        """FLOP/s that are assumed of a transformer."""
        return SHARE * self.peak

    @property
    def float32(self) -> float:
        """FLOP/s of products in float32, without tensor cores: a tenth on a GPU."""
        return self.speed if self.kind == "cpu" else self.speed / 10

    @property
    def float64(self) -> float:
        """FLOP/s of solves in float64: a hundredth on a GPU, of which few have units for it; half on a CPU."""
        return self.speed / (2 if self.kind == "cpu" else 100)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that an optimizer moves: GPUs have one for about 300 FLOPs of their peak, CPUs for 100."""
        return self.peak / (100 if self.kind == "cpu" else 300)

    def __str__(self) -> str:
        devices = f"{self.count} devices of " if self.count > 1 else ""
        ram = f", {self.ram / 1e9:.0f} GB of RAM" if self.ram and self.kind != "cpu" else ""
        return (
            f"{devices}{self.memory / 1e9:.0f} GB and {self.peak / 1e12:g} TFLOPS ({self.kind}){ram}, "
            f"a disk of {self.disk / 1e9:g} GB/s"
        )


def parse_hardware(text: str) -> Hardware:
    """Turn ``24GB,300TFLOPS`` into a machine; also ``8x80GB,989TFLOPS,256GB RAM,4GB/s``.

    Args:
        text: Memory of a device (of several alike with their number before it) and speed at its peak in half precision;
            then RAM and speed of the disk, if they are known.

    Raises:
        UserError: It cannot be read, or memory or speed is missing.
    """
    number = r"(\d+(?:\.\d+)?)"
    patterns = {
        "memory": rf"(?:(\d+)x)?{number}gb",
        "peak": rf"(){number}tflops",
        "ram": rf"(){number}gb ?ram",
        "disk": rf"(){number}gb/s",
    }
    values: dict[str, float] = {}
    count = 1
    for part in (piece.strip().lower() for piece in text.split(",")):
        matches = {name: match for name, pattern in patterns.items() if (match := re.fullmatch(pattern, part))}
        if len(matches) != 1 or float(next(iter(matches.values()))[2]) <= 0:
            raise UserError(
                f"--device {text!r}: {part!r} is not understood; write memory and peak speed in half precision like "
                f"{EXAMPLE}, or 8x80GB,989TFLOPS,256GB RAM,4GB/s"
            )
        ((name, match),) = matches.items()
        values[name] = float(match[2]) * (1e12 if name == "peak" else 1e9)
        count = max(1, int(match[1])) if match[1] else count
    if missing := {"memory", "peak"} - values.keys():
        raise UserError(f"--device {text!r} lacks the {' and the '.join(sorted(missing))}; write both, like {EXAMPLE}")
    return Hardware("cuda", values["memory"], values["peak"], count, values.get("ram"), values.get("disk", DISK))


def hardware_here(device: str = "auto") -> Hardware:
    """The machine at hand: its memory as it says, its speed by its kind.

    Args:
        device: See ``RunConfig.device``.
    """
    import psutil
    import torch

    from ppcl.common.devices import resolve_device

    place, ram = resolve_device(device), float(psutil.virtual_memory().total)
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
        peak = next((peak for part, peak in PEAKS.items() if part in name), CUDA_PEAK)
        return Hardware("cuda", float(torch.cuda.mem_get_info(place)[1]), peak, ram=ram)
    return Hardware("cpu", ram, CPU_PEAK * torch.get_num_threads(), ram=ram)
