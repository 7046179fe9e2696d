"""Running a step on fake tensors, which have shapes and no numbers, and counting what it allocates."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
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
        self.known = {tensor.untyped_storage()._cdata for tensor in lasting}
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


def fake_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module with fake tensors on the CPU; call it inside a ``FakeTensorMode``.

    Args:
        module: On any device.
        dtype: Of the parameters; their own if None.
    """

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    memo: dict[int, Any] = {}
    for part in module.modules():
        plain = {k: v for k, v in part.__dict__.items() if not k.startswith("_") or k == "_buffers"}
        memo |= {id(t): fake(t) for t in _tensors(plain)}  # tables of positions are no buffers in some families
    for p in module.parameters():
        kind = dtype if dtype is not None and p.is_floating_point() else p.dtype
        memo[id(p)] = nn.Parameter(fake(p).to(kind), requires_grad=p.requires_grad)
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def fake_tree(tree: Tree) -> Tree:
    """A batch of states with fake tensors on the CPU; call it inside a ``FakeTensorMode``."""
    if isinstance(tree, Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="cpu")
    if isinstance(tree, list | tuple):
        return type(tree)(map(fake_tree, tree))
    return {key: fake_tree(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def simulated_peak(module: nn.Module, step: Callable[[], object], more: Iterable[nn.Module] = ()) -> int:
    """Bytes that ``step`` allocates at most, beyond the parameters of the modules it runs.

    Args:
        module: Runs in the step.
        step: Runs on fake tensors, inside a ``FakeTensorMode``.
        more: Other modules that run.
    """
    lasting = [p for m in (module, *more) for p in m.parameters()]
    with LiveBytes(lasting) as meter:
        step()
    return int(meter.peak)
