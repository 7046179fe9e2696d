"""Which trainers of LoRA load a model of fewer blocks, of which families, and from what: read in their sources.

diffusers' example scripts of August 2026, ostris' ai-toolkit of August 2026, kohya's sd-scripts of February 2026 and
musubi-tuner of June 2026. ``benchmarks/trainers.py`` runs diffusers' script and sd-scripts' loader.
"""

from __future__ import annotations

from collections.abc import Mapping

from ppcl.teacher.families import ADAPTERS

_FOLDER = "loads: the folder"
_FIXED = "refused: its code has the number of blocks"
TRAINERS: Mapping[str, Mapping[str, str]] = {
    "diffusers' scripts": dict.fromkeys(
        (
            *("Flux2Transformer2DModel", "FluxTransformer2DModel", "Ideogram4Transformer2DModel"),
            *("Krea2Transformer2DModel", "Lumina2Transformer2DModel", "QwenImageTransformer2DModel"),
            *("SD3Transformer2DModel", "SanaTransformer2DModel", "ZImageTransformer2DModel"),
        ),
        _FOLDER,
    ),
    "ai-toolkit": {
        **dict.fromkeys(
            (
                *("AuraFlowTransformer2DModel", "CogView4Transformer2DModel", "ErnieImageTransformer2DModel"),
                *("FluxTransformer2DModel", "Lumina2Transformer2DModel", "PRXTransformer2DModel"),
                *("QwenImageTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"),
                "ZImageTransformer2DModel",
            ),
            _FOLDER,
        ),
        **dict.fromkeys(("Flux2Transformer2DModel", "Ideogram4Transformer2DModel", "Krea2Transformer2DModel"), _FIXED),
    },
    "sd-scripts": {
        "FluxTransformer2DModel": "loads: `--format comfyui`, or the folder with `export.shards=3`",
        **dict.fromkeys(
            ("HunyuanImageTransformer2DModel", "Lumina2Transformer2DModel", "SD3Transformer2DModel"), _FIXED
        ),
    },
    "musubi-tuner": {
        "QwenImageTransformer2DModel": "loads: `--format comfyui`, with its own `--num_layers N`",
        **dict.fromkeys(
            (
                *("Flux2Transformer2DModel", "FluxTransformer2DModel", "HunyuanVideo15Transformer3DModel"),
                *("HunyuanVideoTransformer3DModel", "Ideogram4Transformer2DModel", "Kandinsky5Transformer3DModel"),
                *("Krea2Transformer2DModel", "WanTransformer3DModel", "ZImageTransformer2DModel"),
            ),
            _FIXED,
        ),
    },
}


def trainer_table() -> str:
    """Trainers and families as Markdown; families that none of them knows are left out."""
    known = [name for name in sorted(ADAPTERS) if any(name in classes for classes in TRAINERS.values())]
    rows = [f"| {name} | {' | '.join(classes.get(name, '-') for classes in TRAINERS.values())} |" for name in known]
    return "\n".join(
        [
            "Trainers of LoRA on a model of fewer blocks, by the sources of diffusers' example scripts, ostris' "
            "ai-toolkit (both of August 2026), kohya's sd-scripts (February 2026) and musubi-tuner (June 2026). Where "
            "they load the folder, they do so at any depth, and with networks of one width (`plan.uniform_width`). "
            "diffusers' script for Qwen-Image and sd-scripts' loader were run: `benchmarks/trainers.py`. What was "
            "trained goes back to the teacher's numbers: [adapters_bridge.md](adapters_bridge.md).",
            "",
            f"| class | {' | '.join(TRAINERS)} |",
            f"| --- |{' --- |' * len(TRAINERS)}",
            *rows,
        ]
    )
