"""Draw with compiled blocks: all blocks of a list are alike, so one compilation serves them all.

python pipelines/examples/torch_compile.py runs/qwen/pipeline "a cat"
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ppcl.pipelines.examples.common import draw, load, parser


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, draw twice (the first time compiles), say how long each took."""
    arguments = parser(__doc__)
    arguments.add_argument("--backend", default="inductor", help="any backend of torch.compile")
    given = arguments.parse_args(argv)
    pipe = load(given.folder)
    pipe.transformer.compile_repeated_blocks(backend=given.backend, fullgraph=True)
    for name in ("first picture, with compilation", "second picture"):
        start = time.perf_counter()
        picture = draw(pipe, given)
        print(f"{name}: {time.perf_counter() - start:.1f} s")
    picture.save(given.out)


if __name__ == "__main__":
    main()
