import ast
from functools import cache
from pathlib import Path

import pytest

from ppcl.common.streams import Stream

ROOT = Path(__file__).parents[2]
FOLDERS = ("ppcl", "eval", "pipelines", "benchmarks")
TYPES = ("Stream", "str")  # of tokens: image or text


@cache
def trees() -> dict[str, ast.Module]:
    paths = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(paths)}


def bare(files: dict[str, ast.Module]) -> list[str]:
    """Where a generator is made for something else than a name of the enumeration or a parameter ``stream: Stream``."""
    found = []
    for file, node in ((file, node) for file, tree in files.items() for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "step_generator":
            stream = next((word.value for word in node.keywords if word.arg == "stream"), node.args[-1])
            if not ast.unparse(stream).startswith("Stream.") and ast.unparse(stream) != "stream":
                found.append(f"{file}:{node.lineno}")
        elif isinstance(node, ast.arg) and node.arg == "stream" and ast.unparse(node.annotation) not in TYPES:
            found.append(f"{file}:{node.lineno}")
    return found


def test_every_purpose_has_a_number_of_its_own() -> None:
    assert len(Stream.__members__) == len({int(stream) for stream in Stream.__members__.values()})


def test_no_bare_number_is_a_stream() -> None:
    assert bare(trees()) == []


@pytest.mark.parametrize(
    "call", ["step_generator(0, 1, 2)", "streams.step_generator(0, 1, stream=2)", "def f(stream: int): ..."]
)
def test_a_bare_number_is_found(call: str) -> None:
    assert bare({"wrong.py": ast.parse(call)}) == ["wrong.py:1"]


def test_every_purpose_is_used_in_one_module_or_by_its_alternative() -> None:
    """Two modules that draw from one stream draw the same numbers: those here are never of one run."""
    users: dict[str, set[str]] = {name: set() for name in Stream.__members__}
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Stream":
                users[node.attr].add(file)
    assert [name for name, files in users.items() if not files] == []
    assert {name for name, files in users.items() if len(files) > 1} == {"EMOJI_BATCH", "CAPTURED_STEPS"}
