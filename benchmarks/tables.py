"""Make tables of docs/ again, each by the command that docs/benchmarks.md names.

    python benchmarks/tables.py results ladder ablation

A table whose command ended well is not made again until ``--out`` is deleted; one that was
stopped goes on where it was, as its command does. `make tables` makes all that are measured on
the embedded teacher. RUN in a command is ``runs/results/half``, which the first of them makes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = ROOT / "docs" / "benchmarks.md"
RUN = "runs/results/half"
PROGRAMS = {"ppcl": [sys.executable, "-m", "ppcl"], "python": [sys.executable]}


def command_of(name: str) -> list[str]:
    """What makes the table ``docs/NAME.md``, as a list of arguments.

    Raises:
        SystemExit: docs/benchmarks.md has no command for it.
    """
    rows = [row for row in REGISTRY.read_text(encoding="utf-8").splitlines() if f"({name}.md" in row]
    commands = [command for row in rows for command in re.findall(r"`((?:ppcl|python) [^`]+)`", row)]
    if not commands:
        raise SystemExit(f"{REGISTRY.relative_to(ROOT)} names no command for {name}.md; give the name of a table there")
    first, *others = shlex.split(commands[-1])
    return [*PROGRAMS[first], *(re.sub(r"^RUN", RUN, argument) for argument in others)]


def main() -> None:
    """The command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="of pages in docs/, without .md")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="remembers which tables are made")
    given = parser.parse_args()
    commands = {name: command_of(name) for name in given.names}
    for name, command in commands.items():
        done = given.out / name
        if done.is_file():
            continue
        print("+", shlex.join(command[1:]), flush=True)
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(code)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


if __name__ == "__main__":
    main()
