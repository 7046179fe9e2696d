"""Blocks whose forward is compiled while training runs them: torch.compile of the repeated block.

Compiling a whole transformer takes minutes, and alike blocks would be compiled again and again. Compiling the forward
of their class once serves all of them, as diffusers' ``compile_repeated_blocks`` does (regional compilation). Here the
forward alone is replaced, for as long as a step takes: hooks (those that read states, those of FSDP2) stay outside,
names and state dicts are what they were, and whoever copies, saves, draws with or judges a block between two steps has
a block like any other.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from ppcl.teacher.families import Adapter

logger = logging.getLogger(__name__)
BACKEND = "inductor"
# Versions of one forward: with and without gradients, each dtype, each size of smaller modules, one or any number of
# tokens. torch's own limit, 8, is meant to catch mistakes; beyond it blocks run uncompiled without a word.
_VERSIONS = 64


class BlockCompiler:
    """Compiles the forwards of blocks, once a class; where that fails, blocks run as they are.

    Args:
        enabled: False leaves all blocks alone.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._forwards: dict[Callable[..., Any], Callable[..., Any]] = {}

    @contextmanager
    def on(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Run blocks compiled inside the context, and as they were after it.

        Args:
            blocks: Any, also one twice. Those whose forward is replaced already (``distill.offload``) are left alone.
        """
        if not self.enabled:
            yield
            return
        from torch._dynamo import config

        chosen = [block for block in {id(b): b for b in blocks}.values() if "forward" not in block.__dict__]
        for block in chosen:
            block.__dict__["forward"] = MethodType(self._compiled(type(block).forward), block)
        try:
            with config.patch(cache_size_limit=_VERSIONS):  # the name that all versions of torch know
                yield
        finally:
            for block in chosen:
                del block.__dict__["forward"]

    def _compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if forward not in self._forwards:
            self._forwards[forward] = self._or_as_it_is(forward)
        return self._forwards[forward]

    def _or_as_it_is(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(forward, backend=BACKEND)

        @functools.wraps(forward)  # its arguments are looked up by name
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.enabled:
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as error:  # of the compiler; the block's own errors pass
                    self.enabled = False
                    cause = str(getattr(error, "inner_exception", error))
                    reason = next((line for line in cause.splitlines() if line.strip()), type(error).__name__)
                    logger.warning("distill.compile: blocks run uncompiled, since compiling failed (%s)", reason)
            return forward(*args, **kwargs)

        return run


def blocks_of(adapter: Adapter, *transformers: nn.Module) -> Iterator[nn.Module]:
    """All blocks of some transformers of one family."""
    for transformer in transformers:
        for spec in adapter.stacks:
            yield from adapter.blocks(transformer, spec)
