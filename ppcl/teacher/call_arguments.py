"""Trees of call arguments: record them as safetensors, slice them by sample, join them again.

A diffusion transformer is called with tensors, lists (one entry a sample), tuples, numbers
and None. A tree is such a value. What in it is of one sample, and what all share, is found
once on a whole call (:func:`per_sample`) and goes along from then on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppcl.errors import ModelError

Tree = Any
TIMESTEPS = ("timestep", "timesteps", "t")
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


def timesteps(arguments: dict[str, Tree]) -> list[float]:
    """The timestep of each sample as the transformer is told (0-1 or 0-1000, by family); NaN where it is told none."""
    count = batch_size(arguments)
    for name in TIMESTEPS:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            flat = value.detach().cpu().double()
            whole = flat.ndim and flat.numel() % count == 0
            return [float(t) for t in (flat.reshape(count, -1).amax(1) if whole else flat.expand(count))]
    return [math.nan] * count


def valid_tokens(arguments: dict[str, Tree]) -> dict[str, list[int]]:
    """Valid tokens of each sample, by the argument that marks them.

    A pipeline that has nothing to mask leaves ``x_mask`` out (None): then all tokens of ``x`` are valid.
    """
    found = {}
    for name, mask in arguments.items():
        if "mask" in name and isinstance(mask, Tensor) and mask.ndim == 2:
            found[name] = [int(count) for count in mask.bool().sum(1)]
        elif name.endswith("_mask") and mask is None:
            masked = arguments.get(name.removesuffix("_mask"))
            if isinstance(masked, Tensor) and masked.ndim > 1:
                found[name] = [masked.shape[1]] * len(masked)
    return found


def numbers(arguments: dict[str, Tree]) -> int:
    """Numbers in all tensors of a call: how much room it takes."""
    tensors: dict[str, Tensor] = {}
    flatten(arguments, "", tensors)
    return sum(tensor.numel() for tensor in tensors.values())


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


def masked_text(arguments: dict[str, Tree], mask: str) -> Tensor | None:
    """The text (B, tokens, features) that an argument masks, by its name (``x_mask``); None if there is none."""
    text = arguments.get(mask.removesuffix("_mask")) if mask.endswith("_mask") and mask in arguments else None
    return text if isinstance(text, Tensor) and text.ndim == 3 else None


def pad(parts: list[dict[str, Tree]], mask: str) -> list[dict[str, Tree]]:
    """Bring the texts of calls to the length of the longest, with zeros that their mask hides.

    Args:
        parts: Arguments of calls; they stay as they are where their texts are alike, or there is no such mask.
        mask: Argument (B, tokens) that is true, or 1, where a token of the text counts; None in a call where all do.
    """
    texts = [masked_text(part, mask) for part in parts]
    tokens = [text.shape[1] for text in texts if text is not None]
    if not tokens or len({(count, part[mask] is None) for count, part in zip(tokens, parts, strict=True)}) == 1:
        return parts
    dtype = next((part[mask].dtype for part in parts if part[mask] is not None), torch.bool)
    padded = []
    for part, text in zip(parts, texts, strict=True):
        assert text is not None
        valid = torch.ones(text.shape[:2], dtype=dtype) if part[mask] is None else part[mask]
        missing = max(tokens) - text.shape[1]
        longer = functional.pad(text, (0, 0, 0, missing)), functional.pad(valid, (0, missing))
        padded.append({**part, mask.removesuffix("_mask"): longer[0], mask: longer[1]})
    return padded


def without_length(arguments: dict[str, Tree], own: Collection[str], mask: str) -> tuple[str, int]:
    """Equal but for the number for calls that :func:`pad` makes alike.

    Returns:
        The :func:`signature` of all else, and the tokens of the text; the whole signature and 0 where none is masked.
    """
    text = masked_text(arguments, mask)
    if text is None:
        return signature(arguments, own), 0
    return signature({**arguments, mask.removesuffix("_mask"): text[:, :0], mask: None}, own), text.shape[1]


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
    return _mapped(tree, lambda tensor: tensor.to(device))


def to_dtype(tree: Tree, dtype: torch.dtype) -> Tree:
    """Cast all floating-point tensors of a tree."""
    return _mapped(tree, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _mapped(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(item, change) for item in tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    return tree
