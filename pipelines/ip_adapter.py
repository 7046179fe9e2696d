"""IP-Adapters made for the teacher on a compressed pipeline: FLUX.1 and SD3.

Such a file holds one layer for each of the teacher's blocks, and diffusers hands layer i to block i of whatever is
loaded. Here each block gets the layer of the block that it is; a substitute gets that of the block it started from, or
of the middle of its run where that is not known. Attentions with fewer heads get the rows of those that stayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

from ppcl.config.names import PREFIX
from ppcl.errors import ModelError, UserError
from ppcl.modules.slicing import kept_features
from ppcl.teacher.block_map import BlockMap, block_maps, pipeline_record

if TYPE_CHECKING:
    from torch import Tensor

STACK = "transformer_blocks"  # of both families; the single-stream blocks of FLUX get no layers
_LOADER = "_load_ip_adapter_weights"


def load_ip_adapter(pipe: Any, *source: Any, **options: Any) -> tuple[int, ...]:
    """Load an IP-Adapter made for the teacher, every layer into the block that it belongs to.

    What works after ``pipe.load_ip_adapter`` works after this (``set_ip_adapter_scale``, ``unload_ip_adapter``); a list
    of scales has one entry for each block of the compressed pipeline.

    Args:
        pipe: A pipeline that ppcl exported.
        *source: What ``pipe.load_ip_adapter`` takes: a hub id, a folder, or tensors.
        **options: Likewise.

    Returns:
        For each block the number of the layer that it got.

    Raises:
        ModelError: The pipeline was not compressed by ppcl, or its family has no IP-Adapters.
        UserError: The adapter has more or fewer layers than the teacher had blocks.
    """
    record, transformer = pipeline_record(pipe), pipe.transformer
    maps = block_maps(record["kept_blocks"], record.get("starts"))
    if not hasattr(pipe, "load_ip_adapter") or not hasattr(transformer, _LOADER) or STACK not in maps:
        raise ModelError(f"{type(pipe).__name__} takes no IP-Adapter; FLUX.1 and SD3 pipelines do")
    if any(getattr(block, "attn2", None) is not None for block in getattr(transformer, STACK)):
        raise ModelError(
            "this SD3.5 has blocks with a second attention, whose IP-Adapter layers are numbered through; which of the "
            "teacher's blocks had one is not recorded, so no layer can be placed"
        )
    blocks = maps[STACK]
    layers = tuple(_layer_of(blocks, position) for position in range(len(blocks.spans)))
    stock = next(kind for kind in type(transformer).__mro__ if not kind.__name__.startswith(PREFIX))
    load = partial(getattr(stock, _LOADER), transformer)

    def renumbered(given: Any, **more: Any) -> None:
        several = given if isinstance(given, list) else [given]
        moved = [{**one, "ip_adapter": _moved(one["ip_adapter"], layers, blocks)} for one in several]
        load(moved if isinstance(given, list) else moved[0], **more)

    setattr(transformer, _LOADER, renumbered)
    try:
        pipe.load_ip_adapter(*source, **options)
    finally:
        delattr(transformer, _LOADER)
    for path, part in (transformer.config.get("pruning") or {}).items():
        if part["kind"] == "heads":
            _fit_heads(transformer.get_submodule(path), part)
    return layers


def _layer_of(blocks: BlockMap, position: int) -> int:
    first, last = blocks.spans[position]
    start = blocks.start_index(position)
    return (first + last) // 2 if start is None else start


def _moved(weights: Mapping[str, Tensor], layers: tuple[int, ...], blocks: BlockMap) -> dict[str, Tensor]:
    """The layers by the numbers of the compressed pipeline's blocks."""
    numbered: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        number, _, name = key.partition(".")
        numbered.setdefault(int(number) if number.isdecimal() else -1, {})[name] = tensor
    if sorted(numbered) != list(range(blocks.num_teacher_blocks)):
        raise UserError(
            f"this IP-Adapter has {len(numbered)} layers, and the teacher had {blocks.num_teacher_blocks} blocks; it "
            "was made for another model"
        )
    return {f"{new}.{name}": tensor for new, old in enumerate(layers) for name, tensor in numbered[old].items()}


def _fit_heads(attention: Any, part: Mapping[str, Any]) -> None:
    """Cut an adapter's projections to the heads that an attention kept."""
    processor = getattr(attention, "processor", None)
    if isinstance(processor, SD3IPAdapterJointAttnProcessor2_0):
        processor.to_k_ip, processor.to_v_ip = (_rows(m, part) for m in (processor.to_k_ip, processor.to_v_ip))
    elif isinstance(processor, FluxIPAdapterAttnProcessor):
        attention.set_processor(CutFluxIPAdapter(processor, part))


def _rows(linear: nn.Linear, part: Mapping[str, Any]) -> nn.Linear:
    index = kept_features(part, linear.out_features).to(linear.weight.device)
    rows = nn.Linear(linear.in_features, len(index), linear.bias is not None).to(linear.weight)
    with torch.no_grad():
        rows.weight.copy_(linear.weight[index])
        if linear.bias is not None:
            rows.bias.copy_(linear.bias[index])
    return rows.requires_grad_(linear.weight.requires_grad)


class CutFluxIPAdapter(FluxIPAdapterAttnProcessor):  # type: ignore[misc]
    """FLUX's processor where heads are gone: what the picture adds goes to the features of those that stayed.

    FLUX adds the heads' outputs to the state as they are, so each head has its own features there.

    Args:
        whole: The processor with the rows of all heads.
        part: The attention's entry in the config's ``pruning``.
    """

    def __init__(self, whole: FluxIPAdapterAttnProcessor, part: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim, self.scale = (
            whole.hidden_size,
            whole.cross_attention_dim,
            whole.scale,
        )
        self.to_k_ip, self.to_v_ip = (
            nn.ModuleList(_rows(m, part) for m in ms) for ms in (whole.to_k_ip, whole.to_v_ip)
        )
        self.register_buffer("features", kept_features(part, whole.hidden_size), persistent=False)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        ip_hidden_states: list[Tensor] | None = None,
        ip_adapter_masks: Tensor | None = None,
    ) -> Any:
        """The attention as without an adapter, and what the pictures add, (B, tokens, features)."""
        outputs = FluxAttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            return outputs
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
        added = torch.zeros_like(hidden_states)
        for states, scale, to_k, to_v in zip(
            ip_hidden_states or (), self.scale, self.to_k_ip, self.to_v_ip, strict=False
        ):
            key, value = (layer(states).reshape(len(query), -1, *query.shape[2:]) for layer in (to_k, to_v))
            heads = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
            added[..., self.features] += scale * heads.flatten(2, 3).to(added.dtype)
        return (*outputs, added)
