"""Stable Diffusion 3 and 3.5: one list of dual-stream blocks.

The last block sees the text but returns none of it (``context_pre_only``), so it has no
state to imitate and stays. In 3.5 medium the first blocks carry a second attention; the
config names them by number.
"""

from ppcl.teacher.families.base import Adapter, StackSpec

SD3 = Adapter(
    classes=("SD3Transformer2DModel",),
    stacks=(
        StackSpec(
            name="transformer_blocks",
            count_field="num_layers",
            inputs={"image": "hidden_states", "text": "encoder_hidden_states"},
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
            fixed_tail=1,
            index_fields={"dual_attention_layers": "attn2"},
        ),
    ),
)
