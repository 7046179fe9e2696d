"""Draw with weights that wait in CPU memory until they are needed.

python pipelines/examples/cpu_offload.py runs/qwen/pipeline "a cat" --how group
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from ppcl.pipelines.examples.common import device, draw, parser


def main(argv: Sequence[str] | None = None) -> None:
    """Load into CPU memory, offload, draw one picture."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--how",
        choices=("model", "sequential", "group"),
        default="model",
        help="move whole components (fast), single layers (least memory, slow), or groups of layers",
    )
    given = arguments.parse_args(argv)
    if device() == "cpu" and given.how != "group":
        arguments.error(f"--how {given.how} needs an accelerator and there is none; --how group also runs without")
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(given.folder, dtype=dtype)
    if given.how == "model":
        pipe.enable_model_cpu_offload()
    elif given.how == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(onload_device=torch.device(device()), offload_type="leaf_level")
    draw(pipe, given).save(given.out)


if __name__ == "__main__":
    main()
