"""FLUX.1: dual-stream blocks, then single-stream blocks that also return both streams."""

from ppcl.teacher.families.base import Adapter, StackSpec

_STREAMS = {"image": "hidden_states", "text": "encoder_hidden_states"}

FLUX = Adapter(
    classes=("FluxTransformer2DModel",),
    stacks=(
        StackSpec(
            name="transformer_blocks",
            count_field="num_layers",
            inputs=_STREAMS,
            outputs=("text", "image"),
            ffn={"image": "ff", "text": "ff_context"},
            modulation={"image": "norm1.linear", "text": "norm1_context.linear"},
            text_qkv="attn.add_q_proj",
            text_parts={
                "norm1_context": "text_input",
                "attn.to_add_out": "no_output",
                "norm2_context": "identity",
                "ff_context": "text_output",
            },
        ),
        StackSpec(
            name="single_transformer_blocks",
            count_field="num_single_layers",
            inputs=_STREAMS,
            outputs=("text", "image"),
            modulation={"image": "norm.linear"},
        ),
    ),
)
