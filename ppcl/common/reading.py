"""Files that others may have written: what is opened at all, how much of it is read, and how deep it may be. No torch.

There is one reader for JSON and one for YAML. Both are given a regular file of a bounded size, and what they return is
of a bounded depth, with whole numbers that a float holds. Whatever a parser raises is a ``ValueError`` of one line.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ppcl.common.outside import read_regular

MOST_BYTES = 32 << 20  # parsed JSON takes up to thirty times its bytes
MOST_YAML = 256 << 10  # PyYAML reads about 100 kB a second
MOST_DEPTH = 100
MOST_DIGITS = 100  # of a whole number: tokenizers without a limit say 10^30, which is still a float
MOST_NUMBER = 1 << 63  # of what is counted


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file.

    Raises:
        OSError: It is missing, may not be read, is no regular file (a pipe, a device, a folder), or larger than that.
    """
    return read_regular(path, most)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is not JSON, nested too deep, or has whole numbers of too many digits.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        _too_deep()
    _check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: It is not YAML, nested too deep, has aliases, one key twice, or whole numbers of too many digits.
    """
    try:
        value = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises errors of many classes for tags that do not suit their values
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    _check_depth(value)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what makes a short text long, or one of two values count in silence."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*name); write the value out")
        self.depth += 1
        if self.depth > MOST_DEPTH:
            _too_deep()
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise ValueError(f"the key '{twice}' stands there twice; leave one of them")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _check_digits(node.value)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _whole_number(text: str) -> int:
    _check_digits(text)
    return int(text)


def _check_digits(text: str) -> None:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            _too_deep()
        nodes = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in nodes for child in children if isinstance(child, dict | list)]


def _too_deep() -> NoReturn:
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
