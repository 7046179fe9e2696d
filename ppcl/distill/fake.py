"""Running a step on fake tensors, which have shapes and no numbers, and counting what it allocates."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ppcl.teacher.call_arguments import Tree


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make while they live, and their peak.

    Args:
        lasting: Tensors that are there anyway; views of them do not count.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at once.
    """

    def __init__(self, lasting: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lasting = [tensor.untyped_storage() for tensor in lasting]  # held, so that no other takes its address
        self.known = {storage._cdata for storage in self.lasting}
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def lasting_tensors(*modules: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tables (of positions, no buffers in some families), which are there before any step."""
    return [tensor for module in modules for part in module.modules() for tensor in _tensors(part.__dict__)]


def bare_copy(module: nn.Module, mode: FakeTensorMode | None = None) -> nn.Module:
    """Copy a module without its numbers.

    What is to be changed in it (smaller modules, dtypes) is changed on the meta device, before its tensors are fake: a
    ``copy.deepcopy`` of fake parameters reads their data pointers, and what is cut out of the copy damages the heap.

    Args:
        module: On any device.
        mode: The copy has fake tensors of this mode, on the CPU; without one it is on the meta device.
    """
    memo: dict[int, Any] = {}
    with mode or nullcontext():
        memo |= {id(t): _empty(t, "cpu" if mode else "meta") for t in lasting_tensors(module)}
        for p in module.parameters():
            memo[id(p)] = nn.Parameter(memo[id(p)], requires_grad=p.requires_grad)
    copied: nn.Module = copy.deepcopy(module, memo)  # outside the mode: what it does not find there stays real
    return copied


def _empty(tensor: Tensor, device: str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def fake_tree(tree: Tree) -> Tree:
    """A batch of states with fake tensors on the CPU; call it inside a ``FakeTensorMode``."""
    if isinstance(tree, Tensor):
        return _empty(tree, "cpu")
    if isinstance(tree, list | tuple):
        return type(tree)(map(fake_tree, tree))
    return {key: fake_tree(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def simulated_peak(step: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes that ``step`` allocates at most, beyond the tensors of the modules it runs.

    Args:
        step: Runs on fake tensors, inside a ``FakeTensorMode``.
        modules: Run in the step.
    """
    with LiveBytes(lasting_tensors(*modules)) as meter:
        step()
    return int(meter.peak)
