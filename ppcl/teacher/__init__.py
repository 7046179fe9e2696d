"""The model that is compressed: families, loading, what its blocks are called with."""

from typing import Any

from ppcl.common.moved import moved_attribute


def __getattr__(name: str) -> Any:
    return moved_attribute(__name__, name)
