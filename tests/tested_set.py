"""Say which versions an environment has: a file of constraints, or a row of docs/tested_sets.md.

python tests/tested_set.py constraints > tests/constraints.txt
python tests/tested_set.py row NAME  # runs the whole suite twice, each time in another random order
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "numpy")
SEEDS = (1, 2)  # of the two orders


def closure() -> dict[str, str]:
    """Versions by name of what ppcl and its tests need, and of what that needs, as installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["test"]]
    versions: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # for another platform
        versions[canonicalize_name(requirement.name)] = Version(package.version).public  # without +cpu and the like
        needed = [Requirement(text) for text in package.requires or ()]
        extras = ["", *requirement.extras]
        waiting += [n for n in needed if not n.marker or any(n.marker.evaluate({"extra": extra}) for extra in extras)]
    return versions


def run_suite(seed: int) -> str:
    """Run all tests in a random order; the line that pytest ends with."""
    options = ["--numprocesses", "2", "--dist", "worksteal", "-p", "randomly", f"--randomly-seed={seed}"]
    command = [sys.executable, "-m", "pytest", *options]
    last_line = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            sys.stderr.write(line)
            last_line = line.strip("= \n") or last_line
    return last_line


def main() -> None:
    """The command line, see above."""
    match sys.argv[1:]:
        case ["constraints"]:
            pins = "\n".join(f"{name}=={version}" for name, version in sorted(closure().items()))
            print(f"# Versions that were run together: docs/tested_sets.md\n{pins}")
        case ["row", name]:
            versions = (Version(distribution(column).version).public for column in COLUMNS)
            cells = [name, platform.python_version(), *versions]
            print("| " + " | ".join([*cells, "; ".join(run_suite(seed) for seed in SEEDS)]) + " |")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
