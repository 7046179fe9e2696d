"""Trees of call arguments: record them as safetensors, slice them by sample, join them again.

A diffusion transformer is called with tensors, lists (one entry a sample), tuples, numbers
and None. A tree is such a value. What in it is of one sample, and what all share, is found
once on a whole call (:func:`per_sample`) and goes along from then on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ppcl.errors import ModelError

Tree = Any
MOST_AXES = 4  # of a position: picture, time, row and column


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


def per_sample(arguments: dict[str, Tree]) -> frozenset[str]:
    """Tell what has an entry for each sample from what all samples share, by whether its length is the batch size.

    Positions may be as many as there are samples, and are shared whatever their number. Ask this of a whole call: of
    some of its samples the answer may be another.

    Returns:
        Paths: an argument's name, inside a dictionary ``name.key``.
    """
    size = batch_size(arguments)
    found: set[str] = set()

    def visit(node: Tree, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, f"{path}.{key}")
        elif not isinstance(node, list) and not (isinstance(node, Tensor) and node.ndim > 0):
            return
        elif len(node) == size and not _positions(node, path):
            found.add(path)

    for name, value in arguments.items():
        visit(value, name)
    return frozenset(found)


def _positions(node: list[Tree] | Tensor, path: str) -> bool:
    """Whether a value is of positions: (tokens, axes), a vector, or a list of one vector an axis."""
    if path.endswith("_rope_pos"):
        return True
    if isinstance(node, Tensor):  # Ideogram's segment_ids are (B, tokens), which no table of positions looks like
        return path.endswith("_ids") and node.ndim == 2 and node.shape[1] <= MOST_AXES
    vectors = all(isinstance(item, Tensor) and item.ndim == 1 for item in node)
    return vectors and len({len(item) for item in node}) > 1  # texts of several lengths have features too


def take(tree: Tree, rows: list[int], own: Collection[str], path: str = "") -> Tree:
    """Pick samples.

    Args:
        tree: Arguments of a call.
        rows: Which samples.
        own: What :func:`per_sample` found; all else is shared.
        path: Of the tree itself, where it is a part of the arguments.
    """
    if isinstance(tree, dict):
        return {key: take(value, rows, own, _inside(path, key)) for key, value in tree.items()}
    if path not in own:
        return tree
    return tree[rows] if isinstance(tree, Tensor) else [tree[row] for row in rows]


def join(parts: list[Tree], own: Collection[str], path: str = "") -> Tree:
    """Join what :func:`take` picked out of trees of equal signature, along the samples.

    Args:
        parts: Picked trees, in order.
        own: What :func:`per_sample` found in each of the trees they were picked from.
        path: Of the trees themselves, where they are parts of the arguments.
    """
    first = parts[0]
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts], own, _inside(path, key)) for key in first}
    if path not in own:
        return first
    return torch.cat(parts) if isinstance(first, Tensor) else [item for part in parts for item in part]


def signature(tree: Tree, own: Collection[str]) -> str:
    """Equal for trees that :func:`join` may join: shapes without the samples, and all that is shared."""

    def describe(node: Tree, path: str) -> Any:
        if isinstance(node, dict):
            return {key: describe(value, _inside(path, key)) for key, value in node.items()}
        if isinstance(node, Tensor) and path in own:
            return ["tensor", str(node.dtype), list(node.shape[1:])]
        if isinstance(node, Tensor):  # pictures of 2x3 and 3x2 tokens differ in positions alone
            values = hashlib.sha256(node.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            return ["shared", str(node.dtype), list(node.shape), values.hexdigest()]
        if isinstance(node, list) and path in own:
            return ["samples", sorted({json.dumps(_shapes(item)) for item in node})]
        if isinstance(node, list | tuple):
            return [describe(item, f"{path}.") for item in node]  # nothing inside is of one sample
        return node

    return json.dumps(describe(tree, ""), sort_keys=True)


def _shapes(node: Tree) -> Any:
    """A sample's entry without the numbers in its tensors."""
    if isinstance(node, Tensor):
        return ["tensor", str(node.dtype), list(node.shape)]
    if isinstance(node, list | tuple):
        return [_shapes(item) for item in node]
    if isinstance(node, dict):
        return {key: _shapes(value) for key, value in node.items()}
    return node


def _inside(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def store_once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find equal tensors: return the kept ones and ``{dropped name: kept name}``."""
    kept: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    for name, tensor in tensors.items():
        twin = next((k for k, t in kept.items() if t.dtype == tensor.dtype and torch.equal(t, tensor)), None)
        if twin is None:
            kept[name] = tensor.clone()
        else:
            alias[name] = twin
    return kept, alias


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Move all tensors of a tree."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, list | tuple):
        return type(tree)(to_device(item, device) for item in tree)
    if isinstance(tree, dict):
        return {key: to_device(value, device) for key, value in tree.items()}
    return tree
