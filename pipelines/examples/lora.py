"""Draw with a LoRA that was trained on the teacher.

python pipelines/examples/lora.py runs/qwen/pipeline "a cat" --lora style.safetensors
python pipelines/examples/lora.py runs/qwen/pipeline "a cat" --lora style.safetensors --convert compressed.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ppcl.pipelines import convert_lora, load_lora
from ppcl.pipelines.examples.common import draw, exits_cleanly, load, parser


def main(argv: Sequence[str] | None = None) -> None:
    """Load the LoRA onto the right blocks, say what became of it, draw one picture."""
    arguments = parser(__doc__)
    arguments.add_argument("--lora", required=True, help="a file, a folder, or a hub id")
    arguments.add_argument("--runs", choices=("drop", "start"), default="drop")
    arguments.add_argument("--convert", type=Path, help="also write a file for plain load_lora_weights")
    given = arguments.parse_args(argv)
    pipe = load(given.folder)
    print(load_lora(pipe, given.lora, runs=given.runs))
    if given.convert:
        convert_lora(given.lora, given.convert, pipe, runs=given.runs)
    draw(pipe, given).save(given.out)


if __name__ == "__main__":
    exits_cleanly(main)
