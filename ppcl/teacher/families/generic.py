"""Infer the adapter of a class that nobody described, from its source; and check an adapter on one call.

The source says what a loaded model does not: ``range(num_layers)`` around a block list
names its count field, and the block's ``return`` names the order of its streams. Whatever
is not written that plainly is refused. What the source cannot tell, that blocks are called
one after the other with the same further arguments, is checked on the first recorded call.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import ModelError
from ppcl.teacher.families.base import Adapter, StackSpec

TEXT = "encoder_hidden_states"
IMAGE = ("hidden_states", "x", "visual_embed")


@lru_cache(maxsize=64)
def infer(transformer_class: type) -> Adapter:
    """Infer the adapter of a transformer class from its source.

    Raises:
        ModelError: The source leaves a question open; the message is the question alone.
    """
    if not hasattr(transformer_class, "load_config"):
        raise ModelError("it is not a diffusers model")
    lists = block_lists(transformer_class)
    shared = Counter(field for field, _ in lists.values())
    main = {name: found for name, found in lists.items() if shared[found[0]] == 1}
    if not main:
        raise ModelError("no block list of its own count field was found in its source")
    return Adapter((transformer_class.__name__,), tuple(_stack(name, *found) for name, found in main.items()))


def block_lists(transformer_class: type) -> dict[str, tuple[str, type]]:
    """Find ``self.name = nn.ModuleList([Block(...) for _ in range(count_field)])`` in a class's ``__init__``.

    Returns:
        ``{attribute: (count field, block class)}`` in the order of the source. Lists of plain layers
        (no block class of the library, no forward of a stream) are left out.

    Raises:
        ModelError: There is no source, or the loop variable reaches the block: its blocks differ by number.
    """
    constructor = inspect.unwrap(transformer_class.__init__)  # type: ignore[misc]
    fields = inspect.signature(constructor).parameters
    names = vars(sys.modules[transformer_class.__module__])
    found: dict[str, tuple[str, type]] = {}
    for node in ast.walk(_source(constructor)):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        loop = _comprehension(node.value)
        if loop is None or not isinstance(loop.elt, ast.Call) or not isinstance(loop.elt.func, ast.Name):
            continue
        generator = loop.generators[0]
        bound = generator.iter.args[0] if isinstance(generator.iter, ast.Call) and generator.iter.args else None
        field = bound.attr if isinstance(bound, ast.Attribute) else getattr(bound, "id", None)
        block = names.get(loop.elt.func.id)
        if field not in fields or not isinstance(block, type) or not issubclass(block, nn.Module):
            continue
        variables = {n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)}
        if variables & {n.id for n in ast.walk(loop.elt) if isinstance(n, ast.Name)}:
            raise ModelError(f"the blocks of {node.targets[0].attr} differ by number")
        found[node.targets[0].attr] = (str(field), block)
    return found


def return_order(block_class: type) -> tuple[str, ...]:
    """Names of what a block returns, in order; one entry for a bare tensor.

    Raises:
        ModelError: Its returns differ, or are not plain names.
    """
    returns = set()
    for node in ast.walk(_source(inspect.unwrap(block_class.forward))):  # type: ignore[attr-defined]
        if isinstance(node, ast.Return) and node.value is not None:
            if isinstance(node.value, ast.Tuple):
                returns.add(tuple(getattr(part, "id", "?") for part in node.value.elts))
            else:  # a name or a sum is a tensor; a call may return anything
                returns.add(("tensor",) if isinstance(node.value, ast.Name | ast.BinOp) else ("?", "?"))
    if len(returns) != 1 or "?" in next(iter(returns)):
        raise ModelError(f"what {block_class.__name__} returns is not one tensor or one tuple of names")
    return returns.pop()


def _stack(name: str, count_field: str, block_class: type) -> StackSpec:
    arguments = list(inspect.signature(block_class.forward).parameters)[1:]  # type: ignore[attr-defined]
    image = next((a for a in arguments if a in IMAGE), None)
    order = return_order(block_class)
    if image is None or image != arguments[0]:
        raise ModelError(f"which argument of {block_class.__name__} carries the image is not clear")
    if len(order) == 1:
        return StackSpec(name, count_field, {"image": image}, ("image",))
    streams = {image: "image", TEXT: "text"}
    if set(order) != set(streams) or TEXT not in arguments:
        raise ModelError(f"{block_class.__name__} returns {', '.join(order)}, which are not an image and a text stream")
    return StackSpec(name, count_field, {"image": image, "text": TEXT}, tuple(streams[part] for part in order))


def _source(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise ModelError("its source cannot be read") from None


def _comprehension(value: ast.expr) -> ast.ListComp | ast.GeneratorExp | None:
    """The comprehension inside ``nn.ModuleList([... for ...])``."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("ModuleList") and value.args):
        return None
    inner = value.args[0]
    return inner if isinstance(inner, ast.ListComp | ast.GeneratorExp) else None


@torch.no_grad()
def check_adapter(transformer: nn.Module, adapter: Adapter, arguments: Mapping[str, Any], samples: int) -> None:
    """Check on one call that blocks form a chain and differ in nothing but their weights.

    Args:
        transformer: The transformer.
        adapter: What is to be checked.
        arguments: The named arguments of one call, on the transformer's device.
        samples: Batch size of the call.

    Raises:
        ModelError: A count field is wrong, states are not (samples, tokens, features), a block is not called
            exactly once and in order, does not get the states that the block before it returned, or gets
            other arguments than the first one.
    """
    for stack in adapter.stacks:
        blocks = adapter.all_blocks(transformer, stack)
        count = dict(getattr(transformer, "config", {})).get(stack.count_field)
        if len(blocks) != count:
            raise _refusal(transformer, f"{stack.count_field} is {count}, but {stack.name} has {len(blocks)} blocks")
        if not len(adapter.blocks(transformer, stack)):
            continue
        calls = _watch(transformer, adapter, stack, arguments)
        if [index for index, _, _ in calls] != list(range(len(adapter.blocks(transformer, stack)))):
            raise _refusal(transformer, f"the blocks of {stack.name} are not called once each, in order")
        for state in adapter.input_states(stack, calls[0][1]).values():
            if not isinstance(state, Tensor) or state.ndim != 3 or len(state) != samples:
                raise _refusal(transformer, f"the states of {stack.name} are not (samples, tokens, features)")
        _check_chain(transformer, adapter, stack, calls)


Call = tuple[int, dict[str, Any], Any]  # block number, its named arguments, what it returned


def _watch(transformer: nn.Module, adapter: Adapter, stack: StackSpec, arguments: Mapping[str, Any]) -> list[Call]:
    """Run the transformer once and return the calls of a stack's blocks."""
    calls: list[Call] = []
    handles = []
    for index, block in enumerate(adapter.blocks(transformer, stack)):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            calls.append((index, adapter.bind(module, args, kwargs), output))

        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    try:
        transformer(**arguments, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _check_chain(transformer: nn.Module, adapter: Adapter, stack: StackSpec, calls: list[Call]) -> None:
    states = set(stack.inputs.values())
    first = calls[0][1]
    for (_, _, output), (index, named, _) in pairwise(calls):
        parts = output if isinstance(output, tuple | list) else (output,)
        if len(parts) != len(stack.outputs):
            raise _refusal(transformer, f"a block of {stack.name} returns {len(parts)} values, not {stack.outputs}")
        before = adapter.output_states(stack, output)
        inputs = adapter.input_states(stack, named)
        if not all(_same(before[stream], inputs[stream]) for stream in inputs):
            raise _refusal(transformer, f"something happens between blocks {index - 1} and {index} of {stack.name}")
        for name in (first.keys() | named.keys()) - states:
            if not _same(first.get(name), named.get(name)):
                raise _refusal(transformer, f"block {index} of {stack.name} gets a '{name}' of its own")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one is other or bool(one == other))


def _refusal(transformer: nn.Module, reason: str) -> ModelError:
    return ModelError(f"{type(transformer).__name__} cannot be compressed: {reason}; an adapter of its own is needed")
