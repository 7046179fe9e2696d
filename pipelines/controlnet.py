"""ControlNet made for the teacher on a depth-compressed pipeline.

A ControlNet of m residuals serves n blocks: after block i the transformer adds one of them, which its family tells
from i, m and n. The transformer computes n and i from the blocks that it has, so after pruning the residuals arrive at
the wrong places and some are lost. A forward pre-hook mends that: it lays the m residuals out over the teacher's
n sites and hands the transformer one residual a block. A substitute gets the sum of the
residuals of the run it replaces, since each of them is added to the same stream.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ppcl.errors import ModelError
from ppcl.teacher.block_map import BlockMap, block_maps, pipeline_record

if TYPE_CHECKING:
    from torch import Tensor

_HANDLE = "_ppcl_controlnet_handle"


@dataclass(frozen=True)
class ControlFamily:
    """How a family takes ControlNet residuals.

    Attributes:
        pipeline: Name of diffusers' ControlNet pipeline.
        models: Names of the ControlNet classes that belong to it.
        arguments: For each stack the transformer argument with its residuals.
        repeats: Transformer argument that says that residuals repeat (of the first stack only), if there is one.
        site: Number of the residual that follows the teacher's block i, of m residuals and n blocks.
        first: The first block after which residuals are added at all; there the first one of a list.
        numbered: Residuals come as a mapping of block numbers.
    """

    pipeline: str
    models: tuple[str, ...]
    arguments: Mapping[str, str]
    repeats: str | None = None
    site: Callable[[int, int, int], int] = lambda i, m, n: i // math.ceil(n / m)
    first: int = 0
    numbered: bool = False


FAMILIES: dict[str, ControlFamily] = {
    "QwenImageTransformer2DModel": ControlFamily(
        "QwenImageControlNetPipeline",
        ("QwenImageControlNetModel", "QwenImageMultiControlNetModel"),
        {"transformer_blocks": "controlnet_block_samples"},
    ),
    "FluxTransformer2DModel": ControlFamily(
        "FluxControlNetPipeline",
        ("FluxControlNetModel", "FluxMultiControlNetModel"),
        {
            "transformer_blocks": "controlnet_block_samples",
            "single_transformer_blocks": "controlnet_single_block_samples",
        },
        repeats="controlnet_blocks_repeat",
    ),
    "SD3Transformer2DModel": ControlFamily(
        "StableDiffusion3ControlNetPipeline",
        ("SD3ControlNetModel", "SD3MultiControlNetModel"),
        {"transformer_blocks": "block_controlnet_hidden_states"},
        site=lambda i, m, n: int(i / (n / m)),
    ),
    "SanaTransformer2DModel": ControlFamily(
        "SanaControlNetPipeline",
        ("SanaControlNetModel",),
        {"transformer_blocks": "controlnet_block_samples"},
        site=lambda i, m, n: i - 1,
        first=1,
    ),
    "ZImageTransformer2DModel": ControlFamily(
        "ZImageControlNetPipeline",
        ("ZImageControlNetModel",),
        {"layers": "controlnet_block_samples"},
        site=lambda i, m, n: i,
        numbered=True,
    ),
}


def attach_controlnet(pipe: Any, controlnet: Any) -> Any:
    """Return the family's ControlNet pipeline around a compressed pipeline's components.

    The transformer is shared with ``pipe`` and gets a hook that moves the residuals to the right
    blocks; without residuals the hook does nothing. A second call replaces the first one's hook.
    Attach only ControlNets made for the teacher: one trained on the compressed pipeline needs no hook.

    Args:
        pipe: A pipeline that ppcl exported.
        controlnet: A ControlNet model of the family, or a list of them where the family's pipeline takes one.

    Returns:
        A ``QwenImageControlNetPipeline``, or what the family has.

    Raises:
        ModelError: The pipeline was not compressed by ppcl, or there is no ControlNet bridge for the
            family, or the ControlNet is of another family.
    """
    import diffusers

    maps = block_maps(pipeline_record(pipe)["kept_blocks"])
    family = control_family(pipe.transformer)
    for model in controlnet if isinstance(controlnet, (list, tuple)) else [controlnet]:
        if not {kind.__name__ for kind in type(model).__mro__} & set(family.models):
            raise ModelError(
                f"{type(model).__name__} is not a ControlNet for {type(pipe.transformer).__name__}; "
                f"expected {' or '.join(family.models)}"
            )
    kind = getattr(diffusers, family.pipeline)
    accepted = inspect.signature(kind.__init__).parameters
    components = {name: part for name, part in pipe.components.items() if name in accepted}
    controlled = kind(**{**components, "controlnet": controlnet})
    detach_controlnet(pipe)
    hook = _residual_hook(pipe.transformer, maps, family)
    setattr(pipe.transformer, _HANDLE, pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True))
    return controlled


def detach_controlnet(pipe: Any) -> None:
    """Remove the hook that :func:`attach_controlnet` put on the pipeline's transformer, if there is one."""
    handle = pipe.transformer.__dict__.pop(_HANDLE, None)
    if handle is not None:
        handle.remove()


def control_family(transformer: Any) -> ControlFamily:
    """Return how a transformer takes residuals.

    Raises:
        ModelError: There is no bridge for its family.
    """
    for kind in type(transformer).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise ModelError(
        f"there is no ControlNet bridge for {type(transformer).__name__}; supported: {', '.join(sorted(FAMILIES))}"
    )


def expand_residuals(
    samples: Sequence[Tensor] | Mapping[int, Tensor], blocks: BlockMap, family: ControlFamily, repeats: bool = False
) -> list[Tensor] | dict[int, Tensor]:
    """Lay ControlNet residuals out over the blocks of a compressed stack.

    Args:
        samples: The m residuals, (B, image tokens, features) each.
        blocks: Where the blocks come from; n is the number of the teacher's.
        family: Says which residual follows which block.
        repeats: Whether site i takes residual i mod m instead.

    Returns:
        One residual for each block of the compressed stack that the family adds one to, in the family's form.
    """
    known = dict(samples) if isinstance(samples, Mapping) else dict(enumerate(samples))
    count, total = len(samples), blocks.num_teacher_blocks
    expanded: dict[int, Tensor] = {}
    for position, span in enumerate(blocks.spans):
        for index in range(max(span[0], family.first), span[1] + 1):
            number = index % count if repeats else family.site(index, count, total)
            if number in known:
                at = max(position, family.first)  # of a substitute for the very first blocks: one block later
                expanded[at] = expanded[at] + known[number] if at in expanded else known[number]
    if family.numbered:
        return expanded
    nothing = torch.zeros_like(next(iter(known.values())))
    return [expanded.get(position, nothing) for position in range(family.first, len(blocks.spans))]


def _residual_hook(
    transformer: Any, maps: Mapping[str, BlockMap], family: ControlFamily
) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Build the pre-hook; the argument names are read here because inspecting inside of a hook breaks compile."""
    names = tuple(inspect.signature(transformer.forward).parameters)
    first = next(iter(family.arguments))

    def expand(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        repeats = bool(family.repeats and named.get(family.repeats))
        for stack, argument in family.arguments.items():
            samples = named.get(argument)
            if samples is not None and len(samples) and stack in maps:
                named[argument] = expand_residuals(samples, maps[stack], family, repeats and stack == first)
        return (), named

    return expand
