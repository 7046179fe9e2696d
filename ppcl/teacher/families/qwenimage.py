"""Qwen-Image: one list of dual-stream blocks."""

from ppcl.teacher.families.base import Adapter, StackSpec

QWEN_IMAGE = Adapter(
    classes=("QwenImageTransformer2DModel",),
    stacks=(
        StackSpec(
            name="transformer_blocks",
            count_field="num_layers",
            inputs={"image": "hidden_states", "text": "encoder_hidden_states"},
            outputs=("text", "image"),
            ffn={"image": "img_mlp", "text": "txt_mlp"},
            modulation={"image": "img_mod.1", "text": "txt_mod.1"},
            masks={"text": "encoder_hidden_states_mask"},
            text_qkv="attn.add_q_proj",
            text_parts={
                "txt_mod": "unit_gate",
                "txt_norm1": "text_input",
                "attn.to_add_out": "no_output",
                "txt_norm2": "identity",
                "txt_mlp": "text_output",
            },
        ),
    ),
)
