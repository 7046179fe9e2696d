"""Families that need no more than a line or two: which lists, which count fields, in which order blocks return.

Three kinds of blocks cover them. A *dual* block carries both streams and returns them in
the family's order. A *joint* block sees image and text tokens as one sequence. A *cross*
block carries the image alone; the text enters through cross-attention and does not change.
The last two have one stream, called ``image``.
"""

from collections.abc import Mapping
from dataclasses import replace

from ppcl.teacher.families.base import Adapter, StackSpec
from ppcl.teacher.families.flux import FLUX

_TEXT_FIRST = ("text", "image")
_IMAGE_FIRST = ("image", "text")
_FF = {"image": "ff", "text": "ff_context"}
_NORM1 = {"image": "norm1.linear", "text": "norm1_context.linear"}
# Why a family has no smaller modules of a group; all others have, which the adapter suite shows
_SHARED = {"modulation": "one for all blocks, outside them"}
_TABLE = {"modulation": "a table of a few rows, no matrix"}
_ONE_NORM = {"text": "one norm makes both streams' modulation"}


def _dual(
    name: str,
    count_field: str,
    outputs: tuple[str, ...] = _TEXT_FIRST,
    ffn: Mapping[str, str] | None = None,
    text_qkv: str | None = None,
    masks: Mapping[str, str] | None = None,
    modulation: Mapping[str, str] | None = None,
    text_parts: Mapping[str, str] | None = None,
) -> StackSpec:
    streams = {"image": "hidden_states", "text": "encoder_hidden_states"}
    return StackSpec(
        name, count_field, streams, outputs, ffn or {}, modulation or {}, masks or {}, text_qkv, text_parts or {}
    )


def _one(
    name: str,
    count_field: str,
    argument: str = "hidden_states",
    ffn: str | None = None,
    mask: str | None = None,
    modulation: str | Mapping[str, str] | None = None,
) -> StackSpec:
    masks = {"image": mask} if mask else {}
    layers = {"image": modulation} if isinstance(modulation, str) else modulation or {}
    ffns = {"image": ffn} if ffn else {}
    return StackSpec(name, count_field, {"image": argument}, ("image",), ffns, layers, masks)


_FLUX_LIKE = FLUX.stacks  # the same blocks
_TEXT_PARTS = FLUX.stacks[0].text_parts
_BOTH = {"image": "attention_mask", "text": "attention_mask"}  # one mask over both streams, the image first
_HUNYUAN = (
    _dual("transformer_blocks", "num_layers", _IMAGE_FIRST, _FF, "attn.add_q_proj", _BOTH, _NORM1, _TEXT_PARTS),
    _dual("single_transformer_blocks", "num_single_layers", _IMAGE_FIRST, None, None, _BOTH, {"image": "norm.linear"}),
)
_COG = (_dual("transformer_blocks", "num_layers", _IMAGE_FIRST, modulation={"image": "norm1.linear"}),)
_CROSS = (_one("transformer_blocks", "num_layers", ffn="ff"),)
_WAN = (_one("blocks", "num_layers", ffn="ffn"),)

FAMILIES: tuple[Adapter, ...] = (
    Adapter(
        (
            "BriaTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ),
        _FLUX_LIKE,
    ),
    Adapter(
        ("Flux2Transformer2DModel",),
        (
            _dual("transformer_blocks", "num_layers", ffn=_FF, text_qkv="attn.add_q_proj"),
            _one("single_transformer_blocks", "num_single_layers"),
        ),
        {**_SHARED, "text": _SHARED["modulation"]},
        "mlp_ratio",
    ),
    Adapter(
        ("AuraFlowTransformer2DModel",),
        (
            replace(_FLUX_LIKE[0], name="joint_transformer_blocks", count_field="num_mmdit_layers"),
            _one("single_transformer_blocks", "num_single_dit_layers", ffn="ff", modulation="norm1.linear"),
        ),
    ),
    Adapter(
        (
            "HunyuanImageTransformer2DModel",
            "HunyuanVideoTransformer3DModel",
        ),
        _HUNYUAN,
        ffn_field="mlp_ratio",
    ),
    Adapter(
        ("HunyuanVideo15Transformer3DModel",),
        (replace(_HUNYUAN[0], masks={"text": "attention_mask"}),),
        ffn_field="mlp_ratio",
    ),
    Adapter(
        (
            "CogView3PlusTransformer2DModel",
            "CogView4Transformer2DModel",
            "GlmImageTransformer2DModel",
        ),
        _COG,
        _ONE_NORM,
    ),
    Adapter(
        ("CogVideoXTransformer3DModel",),
        (replace(_COG[0], modulation={"image": "norm1.linear", "image.norm2": "norm2.linear"}),),
        _ONE_NORM,
    ),
    # Mochi's last block has no text output (context_pre_only).
    Adapter(
        ("MochiTransformer3DModel",),
        (replace(_COG[0], ffn=_FF, modulation=_NORM1, fixed_tail=1, masks={"text": "encoder_attention_mask"}),),
        {"attention": "positions are learned for each head", "text": "its norms and gates are one"},
    ),
    Adapter(
        ("JoyImageEditTransformer3DModel",),
        (_dual("double_blocks", "num_layers", _IMAGE_FIRST, {"image": "img_mlp", "text": "txt_mlp"}),),
        {**_TABLE, "text": "its modulation is a table"},
        "mlp_width_ratio",
    ),
    Adapter(("AllegroTransformer3DModel", "PixArtTransformer2DModel"), _CROSS, _TABLE),
    Adapter(("SanaTransformer2DModel", "SanaVideoTransformer3DModel"), _CROSS, _TABLE, "mlp_ratio"),
    Adapter(
        ("LTXVideoTransformer3DModel",), _CROSS, {**_TABLE, "attention.attn1": "its rotary embedding spans all heads"}
    ),
    Adapter(
        ("CosmosTransformer3DModel",),
        (
            _one(
                "transformer_blocks",
                "num_layers",
                ffn="ff",
                modulation={
                    "image": "norm1.linear_1",
                    "image.norm2": "norm2.linear_1",
                    "image.norm3": "norm3.linear_1",
                },
            ),
        ),
        ffn_field="mlp_ratio",
    ),
    Adapter(
        ("Krea2Transformer2DModel",),
        (_one("transformer_blocks", "num_layers", ffn="ff", mask="attention_mask"),),
        _TABLE,
        "intermediate_size",
    ),
    Adapter(
        ("ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel", "WanTransformer3DModel"),
        _WAN,
        _TABLE,
        "ffn_dim",
    ),
    Adapter(
        ("LuminaNextDiT2DModel",),
        (_one("layers", "num_layers", ffn="feed_forward", modulation="norm1.linear"),),
        {"attention": "its norms take the mean over all heads"},
        "ffn_dim_multiplier",
    ),
    Adapter(
        ("Lumina2Transformer2DModel",),
        (_one("layers", "num_layers", ffn="feed_forward", mask="attention_mask", modulation="norm1.linear"),),
    ),
    Adapter(
        ("ZImageTransformer2DModel",),
        (_one("layers", "n_layers", "x", "feed_forward", "attn_mask", "adaLN_modulation.0"),),
    ),
    Adapter(
        ("QwenImage21Transformer2DModel",),
        (_one("transformer_blocks", "num_layers", ffn="img_mlp"),),
        _SHARED,
        "mlp_ratio",
    ),
    Adapter(
        ("ErnieImageTransformer2DModel",),
        (replace(_one("layers", "num_layers", "x", "mlp", "attention_mask"), tokens_first=True),),
        _SHARED,
        "ffn_hidden_size",
    ),
    Adapter(
        ("Ideogram4Transformer2DModel",),
        (_one("layers", "num_layers", ffn="feed_forward", modulation="adaln_modulation"),),
        ffn_field="intermediate_size",
    ),
    Adapter(("PRXTransformer2DModel",), (_one("blocks", "depth", modulation="modulation.lin"),), ffn_field="mlp_ratio"),
    Adapter(
        ("Kandinsky5Transformer3DModel",),
        (
            _one(
                "visual_transformer_blocks",
                "num_visual_blocks",
                "visual_embed",
                "feed_forward",
                modulation="visual_modulation.out_layer",
            ),
        ),
    ),
)
