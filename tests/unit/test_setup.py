"""`make setup` with stand-ins for Python and pip: it falls back to the tested versions, and says so once."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
[ "$2" = venv ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> {log}; case "$*" in *--constraint*) exit 0;; esac; exit {pip}' > "$3/bin/pip"
printf '#!/bin/sh\\n[ -e {log} ] && grep -q constraint {log} && exit 0; exit {imports}' > "$3/bin/python"
chmod +x "$3/bin/pip" "$3/bin/python"
"""


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(("pip", "imports"), [(0, 0), (1, 0), (0, 1)], ids=["works", "no install", "no import"])
def test_setup_falls_back(tmp_path: Path, pip: int, imports: int) -> None:
    python, log, venv = tmp_path / "python", tmp_path / "log", tmp_path / "venv"
    python.write_text(PYTHON.format(log=log, pip=pip, imports=imports))
    python.chmod(0o755)
    command = ["make", "--silent", "setup", f"PYTHON={python}", f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (venv / "ready").is_file()
    fails = bool(pip or imports)
    assert len(log.read_text().splitlines()) == 1 + fails
    assert done.stdout.count("tests/constraints.txt") == fails


def test_constraints_hold_all_that_is_declared_and_no_addresses() -> None:
    lines = [line for line in (ROOT / "tests/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
