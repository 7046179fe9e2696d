"""Redraw a picture, with the family's image-to-image pipeline around the same components.

python pipelines/examples/image_to_image.py runs/qwen/pipeline "a cat in watercolour" --image cat.png --strength 0.6
"""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
from diffusers.utils import load_image

from ppcl.pipelines.examples.common import draw, load, parser


def main(argv: Sequence[str] | None = None) -> None:
    """Share the components with the image-to-image pipeline and draw one picture."""
    arguments = parser(__doc__)
    arguments.add_argument("--image", required=True, help="the picture to start from")
    arguments.add_argument("--strength", type=float, default=0.6, help="0 keeps the picture, 1 ignores it")
    given = arguments.parse_args(argv)
    pipe = load(given.folder)
    name = type(pipe).__name__.removesuffix("Pipeline") + "Img2ImgPipeline"
    kind = getattr(diffusers, name, None)
    if kind is None:
        arguments.error(f"diffusers has no {name}, so {type(pipe).__name__} has no image-to-image form")
    # from_pipe drops a transformer whose class is not exactly the declared one, so it is passed by name
    redraw = kind.from_pipe(pipe, transformer=pipe.transformer)
    image = load_image(given.image).resize((given.size, given.size))
    draw(redraw, given, image=image, strength=given.strength).save(given.out)


if __name__ == "__main__":
    main()
