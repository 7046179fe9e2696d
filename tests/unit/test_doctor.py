"""`ppcl doctor`: declared packages from either source, exit codes, and what fits a machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from published import PUBLISHED
from typer.testing import CliRunner

from ppcl import cli
from ppcl.errors import UserError
from ppcl.inspection import doctor
from ppcl.inspection.blueprint import build_on_meta
from ppcl.inspection.hardware import parse_hardware

METADATA = """Metadata-Version: 2.4
Name: ppcl
Version: 0.2.0
Requires-Dist: torch>=2.8
Requires-Dist: nothing-of-this-kind; python_version < "3"
Provides-Extra: gguf
Requires-Dist: gguf>=0.19; extra == "gguf"
Provides-Extra: data
Requires-Dist: datasets>=3; extra == "data"
"""


def declared() -> list[tuple[str, str]]:
    return [(package.extra, str(package.requirement.name)) for package in doctor.declared_packages()]


def test_packages_of_a_checkout_are_those_of_pyproject() -> None:
    assert ("", "torch") in declared()
    assert ("gguf", "gguf") in declared()
    assert ("test", "pytest") in declared()


def test_packages_of_an_installed_ppcl_are_those_of_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ppcl-0.2.0.dist-info").mkdir()
    (tmp_path / "ppcl-0.2.0.dist-info" / "METADATA").write_text(METADATA)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    monkeypatch.setattr(doctor, "PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert declared() == [("", "torch"), ("gguf", "gguf"), ("data", "datasets")]


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("2.14.1+cpu", "torch 2.14.1+cpu"),
        ("2.9.0.dev1", "torch 2.9.0.dev1"),
        ("2.7", "torch wrong version (2.7, needs >=2.8)"),
        (None, "torch missing (needs >=2.8)"),
    ],
)
def test_the_state_of_a_package_in_words(version: str | None, text: str) -> None:
    assert str(doctor.Package(Requirement("torch>=2.8"), "", version)) == text


def with_packages(monkeypatch: pytest.MonkeyPatch, *packages: doctor.Package) -> None:
    monkeypatch.setattr(doctor, "declared_packages", lambda: list(packages))
    monkeypatch.setattr(doctor, "fits_here", lambda folder: iter(["device: a box"]))


def test_a_missing_package_is_an_error_after_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, doctor.Package(Requirement("peft>=0.18"), "", "0.10"))
    with pytest.raises(UserError, match=r"peft wrong version \(0.10, needs >=0.18\); pip install --upgrade ppcl"):
        CliRunner().invoke(cli.app, ["doctor"], catch_exceptions=False)


def test_a_missing_extra_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, doctor.Package(Requirement("gguf>=0.19"), "gguf", None))
    done = CliRunner().invoke(cli.app, ["doctor"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-2:] == ["  gguf: gguf missing (needs >=0.19)", "device: a box"]


@pytest.mark.parametrize(("memory", "name"), [(8e9, "12gb"), (25.3e9, "24gb"), (85e9, "80gb"), (141e9, "80gb")])
def test_the_settings_are_those_of_the_nearest_smaller_card(memory: float, name: str) -> None:
    assert doctor._settings_for(memory).stem == name


def test_full_size_models_are_the_published_ones() -> None:
    for model, (config, _) in doctor.FULL_SIZE.items():
        ours, theirs = build_on_meta(config), build_on_meta(PUBLISHED[model])
        shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("machine", "verdict"),
    [("24GB,165TFLOPS,64GB RAM", "fits;"), ("1GB,1TFLOPS,1GB RAM", "does not fit (device memory in ")],
)
def test_what_fits_a_machine(machine: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, file = doctor.FULL_SIZE["Qwen/Qwen-Image"]
    small = {**config, "num_layers": 12, "num_attention_heads": 2, "joint_attention_dim": 64}
    monkeypatch.setattr(doctor, "FULL_SIZE", {"small": (small, file)})
    monkeypatch.setattr("ppcl.inspection.hardware.hardware_here", lambda: parse_hardware(machine))
    device, line = doctor.fits_here(tmp_path)
    assert device.startswith("device: ")
    assert line.startswith(f"small: {verdict}")
    assert line.endswith(f"/{'24gb' if '24GB' in machine else '12gb'}.yaml --config configs/{file}")
