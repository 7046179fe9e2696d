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
from ppcl.teacher.block_map import RECORD, UNIFORM
from ppcl.teacher.families import ADAPTERS

SUFFIXES = {"diffusers": "", "single-file": ".safetensors", "comfyui": ".safetensors", "gguf": ".gguf"}
_ALWAYS = "--format diffusers always does"
GGUF_ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux",
    "LTXVideoTransformer3DModel": "ltxv",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen_image",
    "WanTransformer3DModel": "wan",
    "Lumina2Transformer2DModel": "lumina2",
    "ZImageTransformer2DModel": "lumina2",
}
# Families without a layout of ours whose blocks ComfyUI counts under diffusers' names, or converts itself
_COMFYUI_OWN = (
    "AuraFlowTransformer2DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
)


def _of_width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"]) // 64


# Numbers of blocks that ComfyUI takes for granted: what they are, count field -> the number
_COMFYUI_DEPTH: dict[str, tuple[str, dict[str, int | Callable[[Mapping[str, Any]], int]]]] = {
    "SD3Transformer2DModel": ("the width / 64", {"num_layers": _of_width}),
    "MochiTransformer3DModel": ("48", {"num_layers": 48}),
    "ErnieImageTransformer2DModel": ("36", {"num_layers": 36}),
    "HiDreamImageTransformer2DModel": ("16 and 32", {"num_layers": 16, "num_single_layers": 32}),
    "OmniGen2Transformer2DModel": ("32", {"num_layers": 32}),
}
_COMFYUI_WIDTHS = ("WanTransformer3DModel",)  # whose networks' width it reads off their weights
_COMFYUI_NAMED = {*LAYOUTS, *_COMFYUI_OWN, "ErnieImageTransformer2DModel"}
_NOTES = {
    (
        "gguf",
        "SD3Transformer2DModel",
    ): "in diffusers and stable-diffusion.cpp; in ComfyUI-GGUF at the teacher's depth alone",
    (
        "gguf",
        "WanTransformer3DModel",
    ): "in diffusers and ComfyUI-GGUF; in stable-diffusion.cpp at 30 or 40 blocks alone",
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
        return f"ComfyUI takes {words} for its number of blocks{got}; in diffusers it loads: --format single-file"
    if name not in _COMFYUI_NAMED:
        return f"ComfyUI does not know it by names that ppcl can write; {_ALWAYS}"
    if config and UNIFORM in (config.get(RECORD) or {}) and name not in _COMFYUI_WIDTHS:
        return (
            f"ComfyUI takes the width of its networks for granted; without plan.uniform_width it loads, and {_ALWAYS}"
        )
    return ""


def format_table() -> str:
    """Formats and families as Markdown: what loads, what is refused and why."""
    kinds = [kind for kind in SUFFIXES if kind != "diffusers"]
    reasons: list[str] = []
    rows = []
    for name in sorted(ADAPTERS):
        cells = [_cell(kind, name, reasons) for kind in kinds]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "`ppcl export --format` of pruned models; of every family `diffusers` writes a folder of stock classes. "
            f"diffusers {metadata.version('diffusers')} was asked itself; the sources of ComfyUI, ComfyUI-GGUF and "
            "stable-diffusion.cpp were read (August 2026, December 2025, August 2026), and ComfyUI's loading code was "
            "run: [formats_comfyui.md](formats_comfyui.md).",
            "",
            f"| class | {' | '.join(kinds)} |",
            f"| --- |{' --- |' * len(kinds)}",
            *rows,
            "",
            *(f"{number}. {reason}." for number, reason in enumerate(reasons, 1)),
        ]
    )


def _cell(kind: str, name: str, reasons: list[str]) -> str:
    """A cell of the table; a reason or note that is new is added to those below the table."""
    why = refusal(kind, name)
    text = why.partition(";")[0] if why else _NOTES.get((kind, name), "")
    if text and text not in reasons:
        reasons.append(text)
    return ("refused" if why else "loads") + (f" ({reasons.index(text) + 1})" if text else "")


def single_file_classes() -> Mapping[str, Mapping[str, Any]]:
    """Classes that diffusers loads from one file, and how it converts their names."""
    from diffusers.loaders import single_file_model

    classes: Mapping[str, Mapping[str, Any]] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    return classes
