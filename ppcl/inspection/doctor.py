"""Is this installation whole, and what can it do on this machine? Torch is imported for the second question alone."""

from __future__ import annotations

import json
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ppcl.config import load_config
from ppcl.config.load import CONFIGS

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # of a checkout; an installed ppcl has metadata
FULL_SIZE = {  # class and settings of published transformers, what differs from diffusers' defaults; the config file
    "Qwen/Qwen-Image": ({"_class_name": "QwenImageTransformer2DModel"}, "qwen_image_10b.yaml"),
    "black-forest-labs/FLUX.1-dev": (
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        "flux_dev_6b5.yaml",
    ),
}


@dataclass(frozen=True)
class Package:
    """A package that ppcl declares.

    Attributes:
        requirement: Its name and versions.
        extra: Of ppcl, that installs it; empty: it is needed always.
        version: That is installed; None: it is not there.
    """

    requirement: Requirement
    extra: str
    version: str | None

    @property
    def state(self) -> str:
        """Whether it can be used: ``ok``, ``missing`` or ``wrong version``."""
        if self.version is None:
            return "missing"
        return "ok" if self.requirement.specifier.contains(self.version, prereleases=True) else "wrong version"

    def __str__(self) -> str:
        name, wanted = self.requirement.name, self.requirement.specifier
        if self.state == "ok":
            return f"{name} {self.version}"
        return f"{name} {self.state} ({f'{self.version}, ' if self.version else ''}needs {wanted})"


def declared_packages() -> list[Package]:
    """The packages of pyproject.toml, required ones first, as they are installed."""
    return [Package(requirement, extra, _installed(requirement.name)) for extra, requirement in _declared()]


def _declared() -> Iterator[tuple[str, Requirement]]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8")).get("project", {}) if PROJECT.is_file() else {}
    if project.get("name") == "ppcl":
        for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
            yield from ((extra, Requirement(line)) for line in lines)
        return
    requirements = [Requirement(line) for line in metadata.requires("ppcl") or []]
    for extra in ("", *(metadata.metadata("ppcl").get_all("Provides-Extra") or [])):
        for requirement in requirements:
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": ""}):
                belongs = not extra
            else:
                belongs = marker.evaluate({"extra": extra})
            if belongs:
                yield extra, requirement


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_lines(packages: list[Package]) -> list[str]:
    """Lay packages out: a line for each that is required, a line for each extra."""
    lines = [f"  {package}" for package in packages if not package.extra]
    lines.append("extras (pip install 'ppcl[NAME]'):")
    extras = dict.fromkeys(package.extra for package in packages if package.extra)
    return lines + [f"  {extra}: {', '.join(str(p) for p in packages if p.extra == extra)}" for extra in extras]


def fits_here(folder: Path) -> Iterator[str]:
    """Say of this machine what it is, and of published models what a run takes here, a line each.

    Args:
        folder: Where a run would be written; the free space of its disk counts.
    """
    from ppcl.inspection.estimate import estimate_run
    from ppcl.inspection.hardware import hardware_here

    hardware, free = hardware_here(), shutil.disk_usage(folder).free
    yield f"device: {hardware}; {free / 1e9:.0f} GB of disk are free here"
    settings = _settings_for(hardware.memory)
    for model, (transformer, file) in FULL_SIZE.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "config.json"
            path.write_text(json.dumps(transformer), encoding="utf-8")
            found = estimate_run(str(path), load_config([settings, CONFIGS / file], []), hardware)
        lacking = [f"device memory in {' and '.join(found.too_large)}"] * bool(found.too_large)
        lacking += ["RAM"] * (hardware.kind != "cpu" and found.ram > (hardware.ram or found.ram))
        lacking += ["disk"] * (found.disk > free)
        verdict = f"does not fit ({', '.join(lacking)})" if lacking else "fits"
        yield (
            f"{model}: {verdict}; to halve it takes {found.device / 1e9:.1f} GB of device memory, "
            f"{found.ram / 1e9:.1f} GB of RAM, {found.disk / 1e9:.0f} GB of disk and {found.seconds / 3600:,.0f} hours "
            f"with --config configs/devices/{settings.name} --config configs/{file}"
        )


def _settings_for(memory: float) -> Path:
    """The settings for the largest single card that is no larger than this one, or for the smallest of all."""
    names = {path.stem.removesuffix("gb"): path for path in (CONFIGS / "devices").glob("*gb.yaml")}
    sizes = {int(size): path for size, path in names.items() if size.isdecimal()}  # 8x80gb is eight cards
    return sizes[max((size for size in sizes if size * 1e9 <= memory), default=min(sizes))]
