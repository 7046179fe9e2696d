"""The teacher's denoising states and where they come from."""

from typing import Any

from ppcl.common.moved import moved_attribute


def __getattr__(name: str) -> Any:
    return moved_attribute(__name__, name)
