"""Hooks that are there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def removing(handles: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Remove hooks in the end.

    Args:
        handles: What registering them returns; of a generator those before an error are removed too.
    """
    with ExitStack() as hooks:
        for handle in handles:
            hooks.enter_context(handle)
        yield
