"""Draw with a ControlNet that was trained for the teacher.

python pipelines/examples/controlnet.py runs/qwen/pipeline "a cat" \
    --controlnet InstantX/Qwen-Image-ControlNet-Union --image edges.png
"""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
from diffusers.utils import load_image

from ppcl.pipelines import attach_controlnet
from ppcl.pipelines.controlnet import control_family
from ppcl.pipelines.examples.common import draw, exits_cleanly, load, parser


def main(argv: Sequence[str] | None = None) -> None:
    """Attach the ControlNet and draw one picture."""
    arguments = parser(__doc__)
    arguments.add_argument("--controlnet", required=True, help="a folder or a hub id")
    arguments.add_argument("--image", required=True, help="the control picture")
    arguments.add_argument("--scale", type=float, default=1.0)
    given = arguments.parse_args(argv)
    pipe = load(given.folder)
    kind = getattr(diffusers, control_family(pipe.transformer).models[0])
    model = kind.from_pretrained(given.controlnet, dtype=pipe.transformer.dtype).to(pipe.device)
    controlled = attach_controlnet(pipe, model)
    control = load_image(given.image).resize((given.size, given.size))
    draw(controlled, given, control_image=control, controlnet_conditioning_scale=given.scale).save(given.out)


if __name__ == "__main__":
    exits_cleanly(main)
