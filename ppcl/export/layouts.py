"""What other programs call the weights of a diffusers transformer, and in which pieces they keep them.

The names are those of the models' own releases, which ComfyUI, GGUF runtimes and diffusers' single-file loader read.
A family without an entry keeps diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ppcl.errors import ModelError

Sources = str | tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Names below one prefix of a transformer; ``#`` in a prefix stands for a block's number.

    Attributes:
        prefix: Theirs.
        own: diffusers'.
        names: Their name below the prefix -> diffusers' below its own. Several of diffusers' lie below one another in
            one tensor. A name is a module's, or else a single parameter's.
    """

    prefix: str
    own: str
    names: Mapping[str, Sources]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches diffusers' names below the prefix: the block's number, if there is one, and the rest."""
        return re.compile(re.escape(self.own).replace(r"\#", r"(?P<number>\d+)") + r"(?P<rest>.+)")

    @cached_property
    def places(self) -> Mapping[str, tuple[str, int, int]]:
        """Of each of diffusers' names: theirs, which part of that tensor it is, and of how many."""
        found: dict[str, tuple[str, int, int]] = {}
        for name, sources in self.names.items():
            sources = (sources,) if isinstance(sources, str) else sources
            found |= {source: (name, part, len(sources)) for part, source in enumerate(sources)}
        return found

    def place(self, name: str) -> tuple[str, int, int] | None:
        """Their whole name for one of diffusers', with the part; None if it is not below this prefix, or unknown."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        prefix, rest = self.prefix.replace("#", match.groupdict().get("number") or ""), match["rest"]
        if rest in self.places:
            theirs, part, parts = self.places[rest]
            return f"{prefix}{theirs}", part, parts
        module, _, parameter = rest.rpartition(".")
        if module in self.places:
            theirs, part, parts = self.places[module]
            return f"{prefix}{theirs}.{parameter}", part, parts
        return None


@dataclass(frozen=True)
class Layout:
    """A family's names.

    Attributes:
        pieces: The first that knows a name counts.
        same: Beginnings of names that no piece knows and that are the same in both.
    """

    pieces: tuple[Piece, ...]
    same: tuple[str, ...] = ()

    def arranged(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Their names, each with those of diffusers whose tensors it holds, one below the other.

        Raises:
            ModelError: A name is not known, or one of several that belong together is not there.
        """
        groups: dict[str, dict[int, str]] = {}
        sizes = {}
        for name in names:
            places = (place for piece in self.pieces if (place := piece.place(name)))
            place = next(places, (name, 0, 1) if name.startswith(self.same) else None)
            if place is None:
                raise ModelError(f"nothing is known of what other programs call {name}; write --format diffusers")
            theirs, part, sizes[theirs] = place
            groups.setdefault(theirs, {})[part] = name
        for theirs, parts in groups.items():
            if len(parts) != sizes[theirs]:
                raise ModelError(f"{theirs} needs {sizes[theirs]} tensors, and only {sorted(parts.values())} are there")
        return {theirs: tuple(parts[i] for i in range(len(parts))) for theirs, parts in groups.items()}


def _qkv(*names: str) -> Sources:
    return tuple(f"attn.{name}" for name in names)


_EMBEDDERS: dict[str, Sources] = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_DUAL: dict[str, Sources] = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": _qkv("to_q", "to_k", "to_v"),
    "txt_attn.qkv": _qkv("add_q_proj", "add_k_proj", "add_v_proj"),
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_SINGLE: dict[str, Sources] = {
    "modulation.lin": "norm.linear",
    "linear1": (*_qkv("to_q", "to_k", "to_v"), "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_FLUX2 = {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **{name: _EMBEDDERS[name] for name in ("txt_in", "img_in", "final_layer.linear", "final_layer.adaLN_modulation.1")},
}
_FLUX2_DUAL: dict[str, Sources] = {
    **{name: sources for name, sources in _FLUX_DUAL.items() if "attn" in name},
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FLUX2_SINGLE: dict[str, Sources] = {
    **{name: sources for name, sources in _FLUX_SINGLE.items() if "norm" in name},
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
}
_LTX = {
    "patchify_proj": "proj_in",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "adaln_single.linear": "time_embed.linear",
}
_LTX_BLOCK = {f"attn{i}.{letter}_norm": f"attn{i}.norm_{letter}" for i in (1, 2) for letter in "qk"}
_SD3: dict[str, Sources] = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SD3_BLOCK: dict[str, Sources] = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": _qkv("to_q", "to_k", "to_v"),
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.qkv": _qkv("add_q_proj", "add_k_proj", "add_v_proj"),
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_WAN: dict[str, Sources] = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "patch_embedding": "patch_embedding",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_WAN_BLOCK: dict[str, Sources] = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{theirs}": f"attn1.{own}" for theirs, own in zip("qkv", ("to_q", "to_k", "to_v"), strict=True)},
    **{f"cross_attn.{theirs}": f"attn2.{own}" for theirs, own in zip("qkv", ("to_q", "to_k", "to_v"), strict=True)},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",  # before the cross-attention in both
}


def _next_dit(own: str, names: Mapping[str, Sources], refiner: Mapping[str, Sources]) -> tuple[Piece, ...]:
    """Blocks of Lumina 2 and of Z-Image, which are named alike: those with modulation, and those that refine text."""
    attention: dict[str, Sources] = {
        "attention.qkv": tuple(f"{own}.to_{letter}" for letter in "qkv"),
        "attention.out": f"{own}.to_out.0",
        "attention.q_norm": f"{own}.norm_q",
        "attention.k_norm": f"{own}.norm_k",
    }
    stacks = {"layers.#.": names, "noise_refiner.#.": names, "context_refiner.#.": refiner}
    return tuple(Piece(stack, stack, {**attention, **others}) for stack, others in stacks.items())


_LUMINA2_REFINER: dict[str, Sources] = {
    "attention_norm1": "norm1",
    "attention_norm2": "norm2",
    **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
}
_LUMINA2: dict[str, Sources] = {
    **_LUMINA2_REFINER,
    "attention_norm1": "norm1.norm",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA2_TOP: dict[str, Sources] = {
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_Z_IMAGE_TOP: dict[str, Sources] = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_IDEOGRAM4: dict[str, Sources] = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.o": "attention.to_out.0",
}
_NEXT_DIT_SAME = ("layers.", "noise_refiner.", "context_refiner.")

LAYOUTS: dict[str, Layout] = {
    "FluxTransformer2DModel": Layout(
        (
            Piece("double_blocks.#.", "transformer_blocks.#.", _FLUX_DUAL),
            Piece("single_blocks.#.", "single_transformer_blocks.#.", _FLUX_SINGLE),
            Piece("", "", _EMBEDDERS),
        )
    ),
    "Flux2Transformer2DModel": Layout(
        (
            Piece("double_blocks.#.", "transformer_blocks.#.", _FLUX2_DUAL),
            Piece("single_blocks.#.", "single_transformer_blocks.#.", _FLUX2_SINGLE),
            Piece("", "", _FLUX2),
        )
    ),
    "LTXVideoTransformer3DModel": Layout(
        (Piece("transformer_blocks.#.", "transformer_blocks.#.", _LTX_BLOCK), Piece("", "", _LTX)), same=("",)
    ),
    "SD3Transformer2DModel": Layout(
        (Piece("joint_blocks.#.", "transformer_blocks.#.", _SD3_BLOCK), Piece("", "", _SD3))
    ),
    "Ideogram4Transformer2DModel": Layout((Piece("layers.#.", "layers.#.", _IDEOGRAM4),), same=("",)),
    "WanTransformer3DModel": Layout((Piece("blocks.#.", "blocks.#.", _WAN_BLOCK), Piece("", "", _WAN))),
    "Lumina2Transformer2DModel": Layout(
        (*_next_dit("attn", _LUMINA2, _LUMINA2_REFINER), Piece("", "", _LUMINA2_TOP)),
        same=(*_NEXT_DIT_SAME, "x_embedder."),
    ),
    "ZImageTransformer2DModel": Layout(
        (
            *_next_dit("attention", {}, {}),
            Piece("", "", _Z_IMAGE_TOP),
        ),
        same=(*_NEXT_DIT_SAME, "t_embedder.", "cap_embedder.", "x_pad_token", "cap_pad_token"),
    ),
}
