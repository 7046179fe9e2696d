"""Trees of call arguments: record them as safetensors, slice them by sample, join them again.

A diffusion transformer is called with tensors, lists (one entry a sample), tuples, numbers
and None. A tree is such a value; its batch size is known from the call.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ppcl.errors import ModelError

Tree = Any


def flatten(tree: Tree, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree into ``tensors`` and return the rest as JSON values.

    Raises:
        ModelError: A leaf is neither a tensor nor a plain value.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"tensor": prefix}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [flatten(item, f"{prefix}.{i}", tensors) for i, item in enumerate(tree)]}
    if isinstance(tree, dict):
        return {"dict": {str(k): flatten(v, f"{prefix}.{k}", tensors) for k, v in tree.items()}}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise ModelError(f"the transformer's argument {prefix} is a {type(tree).__name__}, which cannot be recorded")


def unflatten(node: Any, tensors: dict[str, Tensor]) -> Tree:
    """The inverse of :func:`flatten`."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [unflatten(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def batch_size(arguments: dict[str, Tree]) -> int:
    """Samples of a call: the first dimension of its first tensor, or the length of its first list."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
        if isinstance(value, list):
            return len(value)
    raise ModelError("the transformer was called without any tensor")


def take(tree: Tree, rows: list[int], size: int) -> Tree:
    """Pick samples: tensors and lists with ``size`` entries are per sample, all else is shared."""
    if isinstance(tree, Tensor):
        return tree[rows] if tree.ndim > 0 and len(tree) == size else tree
    if isinstance(tree, list):
        return [tree[row] for row in rows] if len(tree) == size else tree
    if isinstance(tree, dict):
        return {key: take(value, rows, size) for key, value in tree.items()}
    return tree


def join(parts: list[Tree], like: Tree, size: int) -> Tree:
    """Join what :func:`take` picked out of trees of equal signature, along the samples.

    Args:
        parts: Picked trees, in order.
        like: One of the trees they were picked from: it tells what is per sample, which a part
            cannot (a shared tensor may happen to have as many rows as the part has samples).
        size: Samples of ``like``.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if like.ndim > 0 and len(like) == size else first
    if isinstance(first, list):
        return [item for part in parts for item in part] if len(like) == size else first
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts], like[key], size) for key in first}
    return first


def signature(tree: Tree, size: int) -> str:
    """Equal for trees that :func:`join` may join: shapes without the samples, and shared plain values."""

    def describe(node: Tree) -> Any:
        if isinstance(node, Tensor):
            per_sample = node.ndim > 0 and len(node) == size
            return ["tensor", str(node.dtype), per_sample, list(node.shape[1:] if per_sample else node.shape)]
        if isinstance(node, list) and len(node) == size:
            kinds = {json.dumps(describe(item)) for item in node}
            return ["samples", sorted(kinds)]
        if isinstance(node, list | tuple):
            return [describe(item) for item in node]
        if isinstance(node, dict):
            return {key: describe(value) for key, value in node.items()}
        return node

    return json.dumps(describe(tree), sort_keys=True)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Move all tensors of a tree."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, list | tuple):
        return type(tree)(to_device(item, device) for item in tree)
    if isinstance(tree, dict):
        return {key: to_device(value, device) for key, value in tree.items()}
    return tree
