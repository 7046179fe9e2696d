"""The wheel and the sdist carry all that the program reads, and start where there is no repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ppcl import __version__
from ppcl.config import load_config
from ppcl.config.load import CONFIGS
from ppcl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"
SOURCES = {"ppcl": "ppcl", "eval": "ppcl/eval", "pipelines": "ppcl/pipelines", "configs": "ppcl/configs"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the repository's files."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def installed_files() -> set[str]:
    """Every file of the folders that are installed, as it is named in the package."""
    return {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_and_sdist_have_every_file(built: Path) -> None:
    with zipfile.ZipFile(built / f"ppcl-{__version__}-py3-none-any.whl") as wheel:
        in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    with tarfile.open(built / f"ppcl-{__version__}.tar.gz") as sdist:
        in_sdist = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert "ppcl/configs/devices/24gb.yaml" in in_wheel
    assert in_wheel == installed_files()
    assert in_wheel <= in_sdist


def test_the_wheel_starts_outside_the_repository(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "here").mkdir()
    code = (
        "import ppcl, sys; from pathlib import Path; from ppcl.cli import main; from ppcl.config import for_model\n"
        "config = for_model('emoji', ppcl.load_config([Path('configs/devices/24gb.yaml')], []))\n"
        "print(ppcl.__file__, config.blocks, config.capture.height)\nsys.argv = ['ppcl', '--version']\nmain()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [
        str(tmp_path / "site" / "ppcl" / "__init__.py"),
        "streamed",
        "48",
        __version__,
    ], done.stderr


def test_a_config_file_of_ppcl_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config([Path("configs/devices/24gb.yaml")], []).blocks == "streamed"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "emoji.yaml").write_text("seed: 7\n")
    assert load_config([Path("configs/emoji.yaml")], []).seed == 7  # one's own counts
    with pytest.raises(ConfigError, match="does not exist; those of ppcl are in"):
        load_config([Path("configs/24gb.yaml")], [])


def test_files_of_the_package_are_no_links_to_nowhere() -> None:
    assert CONFIGS.is_dir()
    assert [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if not path.exists()] == []


def test_the_shell_completes_commands() -> None:
    code = "import sys; sys.argv = ['ppcl']; from ppcl.cli import main; main()"
    asked = {"_PPCL_COMPLETE": "complete_bash", "COMP_WORDS": "ppcl comp", "COMP_CWORD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["compress", "compare"], done.stderr
