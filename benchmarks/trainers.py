"""Do other people's trainers of LoRA load a model of fewer blocks? Their own code is run, from checkouts of theirs.

    python benchmarks/trainers.py RUN/pipeline --diffusers CHECKOUT --sd-scripts CHECKOUT

RUN is a run of depth alone on a Qwen-Image (the embedded teacher is one). diffusers' own script trains a LoRA on it for
two steps, which is then converted for the teacher. kohya's sd-scripts know no Qwen-Image: its loader of FLUX is given a
tiny FLUX, whose sizes stand in its table in the place of the published ones: a folder with three files of weights, and
the one file of ``ppcl export --format comfyui``; both are called, and compared with diffusers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ppcl.common.files import write_json
from ppcl.config import ExportConfig
from ppcl.export.formats import export_as
from ppcl.export.pipeline import shard_size
from ppcl.pipelines import convert_lora
from ppcl.teacher.loading import load_pipeline

SCRIPT = "examples/dreambooth/train_dreambooth_lora_qwen_image.py"
SIZES = {"hidden_size": 256, "num_heads": 2, "context_in_dim": 24, "vec_in_dim": 8}  # of the tiny FLUX, in their words


def by_diffusers(checkout: Path, pipeline: Path, folder: Path) -> str:
    """Train a LoRA by diffusers' script and convert it to the teacher's numbers."""
    (folder / "pictures").mkdir()
    Image.new("RGB", (48, 48), (200, 30, 30)).save(folder / "pictures" / "a.png")
    options = {
        **{"pretrained_model_name_or_path": pipeline.resolve(), "instance_data_dir": folder / "pictures"},
        **{"instance_prompt": "photo", "resolution": 48, "train_batch_size": 1, "max_train_steps": 2, "rank": 4},
        **{"output_dir": folder, "mixed_precision": "no", "max_sequence_length": 64},
    }
    command = [sys.executable, str(checkout.resolve() / SCRIPT)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, cwd=folder, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    student = load_pipeline(str(pipeline), torch.device("cpu"))
    report = convert_lora(
        folder / "pytorch_lora_weights.safetensors", folder / "back.safetensors", student, to="teacher"
    )
    return f"trained; {len(report.mapped)} tensors go to the teacher, {len(report.dropped)} of substitutes do not"


@torch.no_grad()
def by_sd_scripts(checkout: Path, folder: Path) -> str:
    """Load a tiny FLUX of 3 and 4 blocks by sd-scripts' loader, and compare what it says with diffusers."""
    from diffusers import FluxTransformer2DModel

    sys.path.insert(0, str(checkout))
    sys.modules.setdefault("cv2", types.ModuleType("cv2"))  # they resize pictures with it
    utils, models = (importlib.import_module(f"library.flux_{name}") for name in ("utils", "models"))
    entry = models.configs["dev"]
    models.configs["dev"] = dataclasses.replace(entry, params=dataclasses.replace(entry.params, **SIZES))
    torch.manual_seed(0)
    own: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=3, num_single_layers=4, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(16, 56, 56), guidance_embeds=True,
    ).eval()  # fmt: skip
    settings = ExportConfig.model_validate({"shards": 3})
    own.save_pretrained(folder / "flux" / "transformer", max_shard_size=shard_size(own.state_dict(), settings))
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    write_json(folder / "flux" / "model_index.json", index)
    export_as(folder / "flux", folder / "flux.safetensors", "comfyui")
    image, text, pooled = torch.randn(1, 4, 64), torch.randn(1, 5, 24), torch.randn(1, 8)
    places, scale, time = torch.zeros(1, 4, 3), torch.tensor([3.5]), torch.tensor([0.5])
    words = {"hidden_states": image, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": time}
    words |= {"img_ids": places[0], "txt_ids": torch.zeros(5, 3), "guidance": scale}
    expected = own(**words, return_dict=False)[0]
    errors = []
    for path in (folder / "flux", folder / "flux.safetensors"):
        _, theirs = utils.load_flow_model(str(path), torch.float32, "cpu")
        result = theirs(image, places, text, torch.zeros(1, 5, 3), time, pooled, guidance=scale)
        errors.append(f"{float((result - expected).norm() / expected.norm()):.0e}")
    return f"3 and 4 blocks; relative error to diffusers {errors[0]} (folder of 3 files), {errors[1]} (one file)"


def main() -> None:
    """Print a line for each trainer."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("pipeline", type=Path, nargs="?", help="a Qwen-Image with fewer blocks; for diffusers' script")
    given.add_argument("--diffusers", type=Path, help="a checkout of diffusers")
    given.add_argument("--sd-scripts", type=Path, help="a checkout of kohya's sd-scripts; needs einops")
    options = given.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.diffusers:
            print("diffusers:", by_diffusers(options.diffusers, options.pipeline, Path(folder)))
        if options.sd_scripts:
            print("sd-scripts:", by_sd_scripts(options.sd_scripts, Path(folder)))


if __name__ == "__main__":
    main()
