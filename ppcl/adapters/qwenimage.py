"""Qwen-Image: one list of dual-stream blocks."""

from ppcl.adapters.base import Adapter, StackSpec

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
        ),
    ),
)
