"""Families that need no more than a line or two: which lists, which count fields, in which order blocks return.

Three kinds of blocks cover them. A *dual* block carries both streams and returns them in
the family's order. A *joint* block sees image and text tokens as one sequence. A *cross*
block carries the image alone; the text enters through cross-attention and does not change.
The last two have one stream, called ``image``.
"""

from dataclasses import replace

from ppcl.teacher.families.base import Adapter, StackSpec

_TEXT_FIRST = ("text", "image")
_IMAGE_FIRST = ("image", "text")
_FF = {"image": "ff", "text": "ff_context"}


def _dual(
    name: str,
    count_field: str,
    outputs: tuple[str, ...] = _TEXT_FIRST,
    ffn: dict[str, str] | None = None,
    text_qkv: str | None = None,
) -> StackSpec:
    streams = {"image": "hidden_states", "text": "encoder_hidden_states"}
    return StackSpec(name, count_field, streams, outputs, ffn or {}, text_qkv=text_qkv)


def _one(name: str, count_field: str, argument: str = "hidden_states", ffn: str | None = None) -> StackSpec:
    return StackSpec(name, count_field, {"image": argument}, ("image",), {"image": ffn} if ffn else {})


_FLUX_LIKE = (
    _dual("transformer_blocks", "num_layers", ffn=_FF, text_qkv="attn.add_q_proj"),
    _dual("single_transformer_blocks", "num_single_layers"),
)
_HUNYUAN = (
    _dual("transformer_blocks", "num_layers", _IMAGE_FIRST, _FF, "attn.add_q_proj"),
    _dual("single_transformer_blocks", "num_single_layers", _IMAGE_FIRST),
)
_COG = (_dual("transformer_blocks", "num_layers", _IMAGE_FIRST),)
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
        (_FLUX_LIKE[0], _one("single_transformer_blocks", "num_single_layers")),
    ),
    Adapter(
        ("AuraFlowTransformer2DModel",),
        (
            _dual("joint_transformer_blocks", "num_mmdit_layers", ffn=_FF, text_qkv="attn.add_q_proj"),
            _one("single_transformer_blocks", "num_single_dit_layers", ffn="ff"),
        ),
    ),
    Adapter(
        (
            "HunyuanImageTransformer2DModel",
            "HunyuanVideoTransformer3DModel",
        ),
        _HUNYUAN,
    ),
    Adapter(("HunyuanVideo15Transformer3DModel",), _HUNYUAN[:1]),
    Adapter(
        (
            "CogView3PlusTransformer2DModel",
            "CogView4Transformer2DModel",
            "CogVideoXTransformer3DModel",
            "GlmImageTransformer2DModel",
        ),
        _COG,
    ),
    # Mochi's last block has no text output (context_pre_only).
    Adapter(("MochiTransformer3DModel",), (replace(_COG[0], fixed_tail=1),)),
    Adapter(("JoyImageEditTransformer3DModel",), (_dual("double_blocks", "num_layers", _IMAGE_FIRST),)),
    Adapter(
        (
            "AllegroTransformer3DModel",
            "CosmosTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "PixArtTransformer2DModel",
            "SanaTransformer2DModel",
            "SanaVideoTransformer3DModel",
            "Krea2Transformer2DModel",
        ),
        _CROSS,
    ),
    Adapter(
        ("ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel", "WanTransformer3DModel"),
        _WAN,
    ),
    Adapter(("LuminaNextDiT2DModel", "Lumina2Transformer2DModel"), (_one("layers", "num_layers", ffn="feed_forward"),)),
    Adapter(("ZImageTransformer2DModel",), (_one("layers", "n_layers", "x", "feed_forward"),)),
    Adapter(("QwenImage21Transformer2DModel",), (_one("transformer_blocks", "num_layers", ffn="img_mlp"),)),
    Adapter(("ErnieImageTransformer2DModel",), (replace(_one("layers", "num_layers", "x", "mlp"), tokens_first=True),)),
    Adapter(("Ideogram4Transformer2DModel",), (_one("layers", "num_layers"),)),
    Adapter(("PRXTransformer2DModel",), (_one("blocks", "depth"),)),
    Adapter(
        ("Kandinsky5Transformer3DModel",),
        (_one("visual_transformer_blocks", "num_visual_blocks", "visual_embed", "feed_forward"),),
    ),
)
