"""What a model family looks like to the compressor.

An adapter answers questions about the blocks of one transformer class: where the block
lists are, which arguments and outputs carry the residual streams, and which submodules
hold the FFN and the text inputs. It never copies a ``forward``.

State of a stream: the tensor (B, tokens, features) that enters or leaves a block. Streams
are called ``image`` and ``text``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ppcl.errors import ModelError
from ppcl.modules.replacements import LinearFeedForward, LowRankLinear
from ppcl.modules.text_stream import TextInput, TextOutput

States = dict[str, Tensor]


@dataclass(frozen=True)
class StackSpec:
    """One block list of a family.

    Attributes:
        name: Attribute of the transformer that holds the ModuleList.
        count_field: Config field with its length.
        inputs: Block argument that carries each stream.
        outputs: Streams in the order in which the block returns them (one entry: a bare tensor).
        ffn: Submodule path of each stream's feed-forward network.
        modulation: Path of each stream's linear layer that makes shifts, scales and gates out of the conditioning.
        masks: Block argument that marks each stream's valid tokens, if there is one, in any form that
            :mod:`ppcl.teacher.families.masks` reads; one over all streams has them in the order of ``inputs``.
        text_qkv: Submodule path of a projection that sees the text input of the attention (eq. 8).
        text_parts: Modules of the text stream, and what each becomes where the stream becomes two linear maps
            (:mod:`ppcl.modules.text_stream`); empty where the block's forward does not allow it.
        fixed_tail: Last blocks that differ from the others and stay as they are (SD3's last block returns no
            text). They are no blocks to the compressor: :meth:`Adapter.blocks` leaves them out.
        tokens_first: The block's states are (tokens, B, features); they are turned round on the way in and out.
        index_fields: Config fields that list the numbers of special blocks (SD3.5's ``dual_attention_layers``),
            with the submodule that tells them from the others.
    """

    name: str
    count_field: str
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    ffn: Mapping[str, str] = field(default_factory=dict)
    modulation: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    text_qkv: str | None = None
    text_parts: Mapping[str, str] = field(default_factory=dict)
    fixed_tail: int = 0
    index_fields: Mapping[str, str] = field(default_factory=dict)
    tokens_first: bool = False

    def turn(self, state: Tensor) -> Tensor:
        """Bring a block's state to (B, tokens, features), or back."""
        return state.transpose(0, 1) if self.tokens_first else state

    def of(self, block: nn.Module) -> StackSpec:
        """The spec as it holds for one block: without the parts that a former round of compression replaced.

        A low-rank modulation layer is one still, and may get a lower rank; a network that is an affine map, or the
        modulation of a text stream that is two linear maps, has nothing left to make smaller.
        """
        parts = dict(block.named_modules())
        linear_text = any(isinstance(parts.get(path), TextInput) for path in self.text_parts)
        modulation = {
            stream: path
            for stream, path in self.modulation.items()
            if isinstance(parts.get(path), nn.Linear | LowRankLinear) and not (linear_text and stream == "text")
        }
        ffn = {
            stream: path
            for stream, path in self.ffn.items()
            if path in parts and not isinstance(parts[path], LinearFeedForward | TextOutput)
        }
        return replace(self, modulation=modulation, ffn=ffn, text_parts={} if linear_text else self.text_parts)


@lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Of a method; blocks are called thousands of times, and reading one takes as long as a small block."""
    return inspect.signature(function)


@dataclass(frozen=True)
class Adapter:
    """A transformer family.

    Attributes:
        classes: Names of the diffusers classes it describes.
        stacks: Block lists in execution order.
        without: Groups of smaller modules that the family has none of, and why; with a module (``attention.attn1``)
            what a group leaves out. The adapter suite shows all others.
        ffn_field: Config field that sets the width of all feed-forward networks of the blocks and of nothing else;
            empty where there is none.
    """

    classes: tuple[str, ...]
    stacks: tuple[StackSpec, ...]
    without: Mapping[str, str] = field(default_factory=dict)
    ffn_field: str = ""

    def blocks(self, transformer: nn.Module, stack: StackSpec) -> nn.ModuleList:
        """Return the blocks that may be replaced: the block list without its fixed tail.

        Raises:
            ModelError: The transformer has no such list.
        """
        blocks = self.all_blocks(transformer, stack)
        return nn.ModuleList(list(blocks)[: -stack.fixed_tail]) if stack.fixed_tail else blocks

    def all_blocks(self, transformer: nn.Module, stack: StackSpec) -> nn.ModuleList:
        """Return the whole block list.

        Raises:
            ModelError: The transformer has no such list.
        """
        blocks = getattr(transformer, stack.name, None)
        if not isinstance(blocks, nn.ModuleList):
            raise ModelError(
                f"{type(transformer).__name__} has no block list '{stack.name}', which its adapter expects; "
                "install the diffusers version this adapter was written for"
            )
        return blocks

    def depth_config(self, transformer: nn.Module) -> dict[str, Any]:
        """Return the config fields that describe the block lists as they are now: counts and block numbers."""
        fields: dict[str, Any] = {}
        for stack in self.stacks:
            blocks = self.all_blocks(transformer, stack)
            fields[stack.count_field] = len(blocks)
            for name, part in stack.index_fields.items():
                fields[name] = [i for i, block in enumerate(blocks) if getattr(block, part, None) is not None]
        return fields

    def bind(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name all arguments of a block call."""
        function = getattr(block.forward, "__func__", None)
        if function is None:  # somebody has put a function of theirs in its place
            return dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)
        named = dict(_signature(function).bind(block, *args, **kwargs).arguments)
        del named[next(iter(named))]  # the block itself
        return named

    def input_states(self, stack: StackSpec, arguments: Mapping[str, Any]) -> States:
        """Pick the streams out of a block's named arguments."""
        return {stream: stack.turn(arguments[name]) for stream, name in stack.inputs.items()}

    def output_states(self, stack: StackSpec, output: Any) -> States:
        """Pick the streams out of what a block returned."""
        if isinstance(output, Tensor):
            return {stack.outputs[0]: stack.turn(output)}
        return dict(zip(stack.outputs, map(stack.turn, output), strict=True))

    def pack(self, stack: StackSpec, states: States) -> Any:
        """The inverse of :meth:`output_states`."""
        if len(stack.outputs) == 1:
            return stack.turn(states[stack.outputs[0]])
        return tuple(stack.turn(states[stream]) for stream in stack.outputs)

    def call(self, stack: StackSpec, block: nn.Module, states: States, arguments: Mapping[str, Any]) -> States:
        """Run a block on given states with the other arguments as captured.

        Args:
            stack: The block's stack.
            block: Any block of its class.
            states: Stream states, (B, tokens, features) each.
            arguments: Named arguments of a captured call; its states are replaced by ``states``.

        Returns:
            The states after the block.
        """
        replaced = {name: stack.turn(states[stream]) for stream, name in stack.inputs.items()}
        return self.output_states(stack, block(**{**arguments, **replaced}))
