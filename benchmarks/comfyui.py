"""Does ComfyUI's own loading code take what `ppcl export --format comfyui` writes?

    pip install einops torchsde comfy-aimdo comfy-kitchen  # what a checkout of ComfyUI imports
    python benchmarks/comfyui.py --comfyui CHECKOUT [--table docs/formats_comfyui.md]

Of each class that has the format a transformer of full width with a few blocks and random weights is written by the
command; ComfyUI finds out what it is, builds its model and loads the weights. All of them must be used and none be
missing, and what ComfyUI holds must be what the file holds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from ppcl.common.files import write_text
from ppcl.common.tables import versions
from ppcl.export.support import refusal
from ppcl.teacher.families import ADAPTERS

BLOCKS = 2  # of each list
FIELDS = (
    "num_layers",
    "num_single_layers",
    "n_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "num_visual_blocks",
)
RELEASED: dict[str, dict[str, Any]] = {  # where a release differs from its class's defaults
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "Kandinsky5Transformer3DModel": {
        "model_dim": 1792,
        "ff_dim": 7168,
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "visual_cond": True,
    },
    "Lumina2Transformer2DModel": {"cap_feat_dim": 2304},
    "PixArtTransformer2DModel": {"caption_channels": 4096},
}
PAGE = """# ComfyUI's own loading code

Transformers of full width with {blocks} blocks of each kind and random weights, as `ppcl export --format comfyui`
writes them, given to `load_diffusion_model_state_dict` of ComfyUI {version} on a CPU. A line that loads: ComfyUI
misses nothing, leaves nothing over, and holds the very numbers of the file.

| class | weights | ComfyUI's model | result |
| --- | ---: | --- | --- |
{rows}

PixArt's embedding of an empty text is one that ComfyUI's class has and diffusers' model has not: of the whole teacher
it says the same.

Command: `python benchmarks/comfyui.py --comfyui CHECKOUT --table docs/formats_comfyui.md`

{versions}
"""


def shallow(name: str) -> Any:
    """A transformer of its class's own width, in bfloat16, with few blocks."""
    kind = getattr(diffusers, name)
    counts = {key: BLOCKS for key in FIELDS if key in inspect.signature(kind.__init__).parameters}
    with torch.device("meta"):
        model = kind(**RELEASED.get(name, {}), **counts).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    return model


class Heard(logging.Handler):
    """Keeps what ComfyUI says of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if any(word in record.getMessage() for word in ("missing", "unexpected", "left over")):
            self.lines.append(record.getMessage()[:200])


def row(name: str, folder: Path) -> str:
    """A line of the table."""
    import comfy.sd

    model = shallow(name)
    count = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder / "model" / "transformer")
    del model
    index = {"_class_name": "APipeline", "transformer": ["diffusers", name]}
    (folder / "model" / "model_index.json").write_text(json.dumps(index))
    file = folder / f"{name}.safetensors"
    command = [sys.executable, "-m", "ppcl", "export", folder / "model", "--format", "comfyui", "--out", file]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    tensors, heard = load_file(file), Heard()
    logging.getLogger().addHandler(heard)
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(tensors))
        held = dict(patcher.model.diffusion_model.state_dict()) if patcher is not None else {}
    except Exception as error:  # whatever a loader of a file that is none of its own raises
        return f"| {name} | {len(tensors)} | - | {type(error).__name__}: {str(error).splitlines()[0][:120]} |"
    finally:
        logging.getLogger().removeHandler(heard)
    if patcher is None:
        return f"| {name} | {len(tensors)} | - | not recognised |"
    kind = type(patcher.model).__name__
    size = sum(tensor.numel() for tensor in held.values())
    different = [key for key, tensor in tensors.items() if key in held and not torch.equal(held[key].cpu(), tensor)]
    if heard.lines:
        verdict = heard.lines[0]
    elif different:
        verdict = f"{len(different)} weights differ, {different[0]} first"
    else:
        verdict = f"loads: {sum(t.numel() for t in tensors.values()):,} numbers of {count:,}, {size:,} held"
    return f"| {name} | {len(tensors)} | {kind} | {verdict} |"


def main() -> None:
    """The command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout")
    parser.add_argument("--only", action="append", help="a class; may be given several times")
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    sys.path.insert(0, str(given.comfyui))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    names = given.only or [name for name in sorted(ADAPTERS) if not refusal("comfyui", name)]
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, Path(folder)))
            print(lines[-1], flush=True)
    version = (given.comfyui / "comfyui_version.py").read_text().rpartition('= "')[2].strip(' "\n')
    if given.table:
        write_text(given.table, PAGE.format(version=version, rows="\n".join(lines), versions=versions(), blocks=BLOCKS))


if __name__ == "__main__":
    main()
