"""Which formats a family has, and why not: what other programs take for granted.

* ``diffusers``: a pipeline folder of stock classes;
* ``single-file``: safetensors that diffusers' ``from_single_file`` loads;
* ``comfyui``: safetensors that ComfyUI recognises;
* ``gguf``: for ComfyUI-GGUF, diffusers and stable-diffusion.cpp.

What is said of the programs was read in their sources (ComfyUI and stable-diffusion.cpp of August 2026, ComfyUI-GGUF of
December 2025). diffusers is asked itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from ppcl.export.layouts import LAYOUTS
from ppcl.teacher.families import ADAPTERS

SUFFIXES = {"diffusers": "", "single-file": ".safetensors", "comfyui": ".safetensors", "gguf": ".gguf"}
_ALWAYS = "--format diffusers always does"
GGUF_ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen_image",
    "WanTransformer3DModel": "wan",
    "Lumina2Transformer2DModel": "lumina2",
    "ZImageTransformer2DModel": "lumina2",
}
# Families without a layout of ours whose blocks ComfyUI counts under diffusers' names, or converts itself
_COMFYUI_OWN = (
    "AuraFlowTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
)


def _of_width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"]) // 64


# Numbers of blocks that ComfyUI takes for granted: what they are, count field -> the number
_COMFYUI_DEPTH: dict[str, tuple[str, dict[str, int | Callable[[Mapping[str, Any]], int]]]] = {
    "SD3Transformer2DModel": ("its width / 64", {"num_layers": _of_width}),
    "MochiTransformer3DModel": ("48", {"num_layers": 48}),
    "ErnieImageTransformer2DModel": ("36", {"num_layers": 36}),
    "HiDreamImageTransformer2DModel": ("16 and 32", {"num_layers": 16, "num_single_layers": 32}),
    "OmniGen2Transformer2DModel": ("32", {"num_layers": 32}),
}
_COMFYUI_NAMED = {*LAYOUTS, *_COMFYUI_OWN, "ErnieImageTransformer2DModel"}
_NOTES = {
    ("gguf", "SD3Transformer2DModel"): "diffusers and stable-diffusion.cpp; ComfyUI-GGUF at the teacher's depth alone",
    ("gguf", "WanTransformer3DModel"): "diffusers and ComfyUI-GGUF; stable-diffusion.cpp at 30 or 40 blocks alone",
}


def refusal(kind: str, name: str, config: Mapping[str, Any] | None = None) -> str:
    """Why a format does not hold a class of transformers, and what would load; empty if it does.

    Args:
        kind: The format.
        name: Of the stock class.
        config: The transformer's; None asks about any depth but the teacher's.
    """
    if kind == "single-file" and name not in single_file_classes():
        return f"diffusers has no single-file loader for it; {_ALWAYS}"
    if kind == "gguf" and name not in GGUF_ARCHITECTURES:
        written = ", ".join(sorted(set(GGUF_ARCHITECTURES.values())))
        return f"ppcl writes no GGUF of it, only of the architectures {written}; {_ALWAYS}"
    if kind != "comfyui":
        return ""
    words, depths = _COMFYUI_DEPTH.get(name, ("", {}))
    expected = {key: n if isinstance(n, int) else config and n(config) for key, n in depths.items()}
    if depths and (config is None or any(config.get(key) != n for key, n in expected.items())):
        got = f", and this one has {' and '.join(str(config.get(key)) for key in depths)}" if config else ""
        return f"ComfyUI takes {words} blocks for granted{got}; diffusers loads it: --format single-file or diffusers"
    if name not in _COMFYUI_NAMED:
        return f"ComfyUI does not know it by names that ppcl can write; {_ALWAYS}"
    return ""


def format_table() -> str:
    """Formats and families as Markdown: what loads, what is refused and why."""
    kinds = [kind for kind in SUFFIXES if kind != "diffusers"]
    rows = []
    for name in sorted(ADAPTERS):
        cells = []
        for kind in kinds:
            why = refusal(kind, name)
            note = _NOTES.get((kind, name), "")
            cells.append(f"refused: {why.partition(';')[0]}" if why else f"loads{f': {note}' if note else ''}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"Of every family `--format diffusers` writes a folder of stock classes. diffusers "
            f"{metadata.version('diffusers')} was asked itself; the sources of ComfyUI, ComfyUI-GGUF and "
            "stable-diffusion.cpp were read (August 2026, December 2025, August 2026). The columns are about pruned "
            "models.",
            "",
            f"| class | {' | '.join(kinds)} |",
            f"| --- |{' --- |' * len(kinds)}",
            *rows,
        ]
    )


def single_file_classes() -> Mapping[str, Mapping[str, Any]]:
    """Classes that diffusers loads from one file, and how it converts their names."""
    from diffusers.loaders import single_file_model

    classes: Mapping[str, Mapping[str, Any]] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    return classes
