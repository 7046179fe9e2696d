"""Where substitutes' weights are zero, and keeping them so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ppcl.common.parts import is_part, part_of
from ppcl.errors import ArtifactError
from ppcl.student.assembly import RunKey, run_name
from ppcl.student.plan import CompressionPlan

Blocks = Mapping[RunKey, nn.Module]


Tensors = dict[str, Tensor]


class Masks:
    """Keeps the zeros of some blocks while they are trained.

    Args:
        masks: By ``stack/first-last/path.weight``, true where a weight stays.
        blocks: The blocks that they belong to, whatever becomes of their parameters.

    Raises:
        ArtifactError: A mask is of no weight, or of another shape.
    """

    def __init__(self, masks: Mapping[str, Tensor], blocks: Blocks) -> None:
        self.masks = dict(masks)
        named = {f"{run_name(key)}/": block for key, block in blocks.items()}
        self.places = []
        for name, mask in self.masks.items():
            prefix = next((p for p in named if name.startswith(p)), None)
            module, _, kind = name.removeprefix(prefix or "").rpartition(".")
            try:
                place = (named[prefix or ""].get_submodule(module), kind)
                shape = place[0].get_parameter(kind).shape
            except (KeyError, AttributeError):
                raise ArtifactError(f"the mask {name} is of no weight of the plan; run distill again") from None
            if shape != mask.shape:
                raise ArtifactError(f"the mask {name} is {tuple(mask.shape)}, its weight {tuple(shape)}")
            self.places.append((name, *place))
        self._placed: Tensors = {}

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, module, kind in self.places:
            weight = module.get_parameter(kind)
            mask = self._placed.get(name)
            if mask is None or mask.device != weight.device or is_part(mask) != is_part(weight):
                mask = self._placed[name] = part_of(self.masks[name].to(torch.uint8), weight)
            yield weight, mask

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Make the gradients of masked weights zero, so that the optimizer's averages of them stay zero, too."""
        for weight, mask in self._pairs():
            if weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def hold_weights(self) -> None:
        """Make masked weights zero."""
        for weight, mask in self._pairs():
            weight.mul_(mask)


def zero_shares(plan: CompressionPlan, masks: Mapping[str, Tensor], params: int) -> CompressionPlan:
    """A sparse plan with what masks really took: of each block's masked layers, and of the student's ``params``."""
    kept: dict[str, list[int]] = {}
    for name, mask in masks.items():
        entry = kept.setdefault("/".join(name.split("/")[:2]), [0, 0])
        entry[0] += mask.numel() - int(mask.sum())
        entry[1] += mask.numel()
    stacks = {}
    for name, segments in plan.stacks.items():
        pieces = []
        for segment in segments:
            zeros, size = kept.get(run_name((name, segment.first, segment.last)), (0, 0))
            pieces.append(replace(segment, sparsity=zeros / size if zeros else 0.0))
        stacks[name] = tuple(pieces)
    zeros, size = (sum(entry[i] for entry in kept.values()) for i in (0, 1))
    shares = {"zeros": zeros / params, "zeros_in_layers": zeros / size} if size else {}
    return replace(plan, stacks=stacks, sparsity={**plan.sparsity, **shares} if size else {})


def pack_masks(masks: Mapping[str, Tensor]) -> Tensors:
    """Masks as bits, eight in a byte, row by row; (o, ceil(i / 8)) uint8 each."""
    packed = {}
    for name, mask in masks.items():
        rows = nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).reshape(len(mask), -1, 8)
        packed[name] = (rows << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    return packed


def unpack_masks(packed: Mapping[str, Tensor], blocks: Blocks) -> Tensors:
    """The inverse of :func:`pack_masks`; the blocks' weights say how long a row is.

    Raises:
        ArtifactError: A mask is of no weight, or of another shape.
    """
    weights = {f"{run_name(key)}/{n}": p for key, block in blocks.items() for n, p in block.named_parameters()}
    masks = {}
    for name, rows in packed.items():
        shape = weights[name].shape if name in weights else torch.Size()
        if len(shape) != 2 or rows.shape != (shape[0], -(-shape[1] // 8)):
            raise ArtifactError(f"the mask {name} does not belong to the weights beside it; run distill again")
        bits = (rows[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
        masks[name] = bits.flatten(1)[:, : shape[1]].bool()
    return masks
