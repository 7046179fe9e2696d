"""Apply a plan: put substitutes in the place of runs, swap any of them in or out.

The student is a shallow copy of the teacher's transformer whose block lists hold the
teacher's own kept blocks (shared, not copied) and the substitutes. It is of the teacher's
class, so everything that runs the teacher runs the student.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ppcl.config.names import Start
from ppcl.errors import ArtifactError
from ppcl.modules.parts import SLICED, changed, label
from ppcl.modules.replacements import (
    InputStatistics,
    LinearFeedForward,
    LowRankLinear,
    affine_of,
    apply_width,
    fill_linear,
    fill_low_rank,
)
from ppcl.modules.slicing import fill_sliced
from ppcl.modules.text_stream import fill_text
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.teacher.blocks import main_dtype
from ppcl.teacher.families import Adapter, StackSpec, States, fixed_tail

RunKey = tuple[str, int, int]
STARTS = get_args(Start)


def run_name(key: RunKey) -> str:
    """A run's name in files: ``stack/first-last``."""
    return f"{key[0]}/{key[1]}-{key[2]}"


def start_block(blocks: Sequence[nn.Module] | nn.ModuleList, first: int, last: int, start: str) -> nn.Module:
    """Return a trainable copy of the block that a substitute for ``first..last`` starts from.

    Args:
        blocks: The teacher's blocks of a stack; each is asked for when it is needed, and not changed.
        first: First block of the run.
        last: Last block of the run, inclusive.
        start: ``first`` (the paper), ``middle`` (its code), ``last``, or ``mean`` of the run's weights.

    Raises:
        ValueError: The start is unknown.
    """
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}; expected one of {', '.join(STARTS)}")
    block = copy.deepcopy(blocks[start_index(first, last, start)])
    if start == "mean":
        sums = {name: (torch.zeros_like(p, dtype=torch.float32), 0) for name, p in block.named_parameters()}
        for index in range(first, last + 1):
            # Blocks of SD3.5 medium differ in shape: the mean is over those that have this parameter.
            for name, parameter in blocks[index].named_parameters():
                if name in sums and parameter.shape == sums[name][0].shape:
                    sums[name] = sums[name][0].add_(parameter.detach()), sums[name][1] + 1
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(sums[name][0] / sums[name][1])
    trained: nn.Module = block.requires_grad_(True)
    return trained


def fill_width(
    block: nn.Module,
    original: nn.Module,
    spec: StackSpec,
    index: int,
    parts: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Give the smaller modules of a block their closed-form weights.

    Args:
        block: Has the smaller modules already.
        original: The block as it was, whose weights a low-rank layer approximates.
        spec: Its stack.
        index: The teacher's block whose inputs it sees, nearest.
        parts: The replacements by path.
        tensors: Metrics, linear maps and corrected columns, as the analyze and fit stages wrote them.

    Raises:
        ArtifactError: They are of another version.
    """
    names = {path: f"modulation.{stream}" for stream, path in spec.modulation.items()}
    names |= {path: f"ffn.{stream}" for stream, path in spec.ffn.items()}
    for path, part in parts.items():
        module, old = block.get_submodule(path), original.get_submodule(path)
        here = f"{spec.name}/{index}"
        prefix = f"{here}/{names.get(path)}"
        if isinstance(module, LowRankLinear):
            weight, bias = affine_of(old)
            if f"{prefix}/inputs" not in tensors:
                raise ArtifactError(
                    f"the analysis does not say what {here}/{path} is given (another version of ppcl wrote it); "
                    "run the analyze stage again"
                )
            number = int(tensors[f"{prefix}/inputs"])  # layers that are given the same share what is known of it
            mean, root = (tensors[f"inputs/{number}/{name}"].to(weight.device).double() for name in ("mean", "root"))
            fill_low_rank(module, weight, bias, InputStatistics(mean, root))
        elif isinstance(module, LinearFeedForward):
            fill_linear(module, tensors[f"{prefix}/weight"], tensors[f"{prefix}/bias"])
        elif part["kind"] in SLICED:
            cut = f"{here}/{path}/{label(part)}/"
            fill_sliced(module, old, part, {n.removeprefix(cut): tensors[n] for n in tensors if n.startswith(cut)})
        elif part["kind"] in ("text_input", "text_output"):
            name = f"{here}/text_input" if part["kind"] == "text_input" else f"{here}/text"
            fill_text(module, tensors[f"{name}/weight"], tensors[f"{name}/bias"])


def substitute_block(blocks: Sequence[nn.Module] | nn.ModuleList, segment: Segment) -> nn.Module:
    """Return the block of a plan's segment: a copy of its start with the segment's smaller modules, untrained.

    What stands for a run is trainable throughout, and so is a block with zeros; of another only what is new in it.
    """
    block = start_block(blocks, segment.first, segment.last, segment.start or "middle")
    apply_width(block, segment.width)
    if not segment.is_run and not segment.sparsity:
        block.requires_grad_(False)
        for path in changed(segment.width):
            block.get_submodule(path).requires_grad_(True)
    return block


def smaller_on_meta(block: nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of a block with smaller modules, yet without weights.

    Raises:
        ModelError: The block has no such modules.
    """
    bare = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in block.parameters()}
    smaller: nn.Module = copy.deepcopy(block, bare)
    apply_width(smaller, parts)
    return smaller


def in_dtypes_of(state: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
    """Weights of a substitute in the dtypes of a block of the teacher, in which they are exported.

    A substitute is trained in float32, which would be twice the bytes of a bfloat16 teacher on disk.

    Args:
        state: The weights by name.
        like: The block; weights that it has not go to the dtype of its largest.
    """
    dtypes, main = {name: tensor.dtype for name, tensor in like.state_dict().items()}, main_dtype(like)
    return {name: t.to(dtypes.get(name, main)) if t.is_floating_point() else t for name, t in state.items()}


def own_names(segment: Segment, names: Sequence[str]) -> list[str]:
    """Of a substitute's weight names, those that are not simply the teacher's block's."""
    whole = segment.is_run or segment.sparsity
    paths = changed(segment.width)
    return [n for n in names if whole or any(n.startswith(f"{path}.") for path in paths)]


def with_blocks(transformer: nn.Module, lists: Mapping[str, Sequence[nn.Module]], own: bool = False) -> Any:
    """Return a shallow copy of a transformer with other block lists; all else is shared, but for its own hooks.

    Args:
        transformer: The teacher's transformer or a student.
        lists: The blocks of some stacks, without fixed tails, which are kept.
        own: Copy the fixed tails, and the parameters and buffers that lie in no submodule, instead of
            sharing them: what is done to them then leaves the given transformer alone.
    """
    clone = copy.copy(transformer)
    clone.__dict__["_modules"] = dict(transformer._modules)
    for name, value in transformer.__dict__.items():
        if name.endswith("_hooks") or "_hooks_" in name:
            clone.__dict__[name] = copy.copy(value)
    if own:
        for kind in ("_parameters", "_buffers"):
            clone.__dict__[kind] = copy.deepcopy(transformer.__dict__[kind])
    for name, blocks in lists.items():
        tail = fixed_tail(transformer, name)
        setattr(clone, name, nn.ModuleList([*blocks, *(copy.deepcopy(tail) if own else tail)]))
    return clone


def assemble_student(
    transformer: nn.Module,
    adapter: Adapter,
    plan: CompressionPlan,
    substitutes: Mapping[RunKey, nn.Module],
    active: Collection[RunKey] | None = None,
) -> Any:
    """Build the student (or a hybrid) that a plan describes.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        plan: Which blocks stay.
        substitutes: One block for each run and each block with smaller modules, keyed (stack, first, last).
        active: Those that are put in; the teacher's blocks stay in the others. All if None.

    Returns:
        A transformer of the teacher's class that shares its kept blocks.
    """
    lists: dict[str, list[nn.Module]] = {}
    for spec in adapter.stacks:
        blocks = adapter.blocks(transformer, spec)
        pieces: list[nn.Module] = []
        for segment in plan.stacks[spec.name]:
            key = (spec.name, segment.first, segment.last)
            if segment.is_substitute and (active is None or key in active):
                pieces.append(substitutes[key])
            else:
                pieces.extend(blocks[segment.first : segment.last + 1])
        lists[spec.name] = pieces
    return with_blocks(transformer, lists)


class StandIn(nn.Module):
    """Stands in a block list; what a model asks of its blocks beside calling them, a real block answers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.template = [block]  # in a list: its parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of its own, or the block's (Qwen-Image 2.1 looks at ``attn.processor``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "template" not in self.__dict__:
                raise
            return getattr(self.__dict__["template"][0], name)


class FixedStates(StandIn):
    """Stands for all blocks before a run: returns recorded states whatever it is given."""

    def __init__(self, adapter: Adapter, stack: StackSpec, states: States, block: nn.Module) -> None:
        super().__init__(block)
        self.packed = adapter.pack(stack, states)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the recorded states."""
        return self.packed


class LinearRun(StandIn):
    """A run replaced by one affine map a stream (chained probes, eq. 3): h -> h A + c."""

    def __init__(
        self, adapter: Adapter, stack: StackSpec, block: nn.Module, maps: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(block)
        self.adapter, self.stack, self.maps = adapter, stack, dict(maps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the maps to the streams of the call."""
        arguments = self.adapter.bind(self.template[0], args, kwargs)
        states = self.adapter.input_states(self.stack, arguments)
        mapped = {
            s: (h.to(self.maps[s][0].dtype) @ self.maps[s][0] + self.maps[s][1]).to(h.dtype) for s, h in states.items()
        }
        return self.adapter.pack(self.stack, mapped)


def patched(
    transformer: nn.Module,
    adapter: Adapter,
    run: RunKey,
    replacement: nn.Module,
    before: States | None = None,
) -> Any:
    """Return the transformer with one run replaced.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        run: (stack, first, last).
        replacement: A module with the blocks' contract.
        before: The states that enter the run, if known: then no block before it is executed.
    """
    lists: dict[str, list[nn.Module]] = {}
    for position, spec in enumerate(adapter.stacks):
        blocks = list(adapter.blocks(transformer, spec))
        here = [s.name for s in adapter.stacks].index(run[0])
        if spec.name == run[0]:
            head: list[nn.Module] = (
                blocks[: run[1]] if before is None else [FixedStates(adapter, spec, before, blocks[0])]
            )
            lists[spec.name] = [*head, replacement, *blocks[run[2] + 1 :]]
        elif before is not None and position < here:
            lists[spec.name] = []
    return with_blocks(transformer, lists)
