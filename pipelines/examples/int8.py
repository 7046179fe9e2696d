"""Draw with a transformer whose weights are 8-bit integers (pip install "ppcl[int8]").

python pipelines/examples/int8.py runs/qwen/pipeline "a cat" --save runs/qwen/pipeline-int8

The saved folder is loaded by plain diffusers, with torchao installed. Quantise the exported
pipeline, after the distillation: the two savings multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

from ppcl.pipelines.examples.common import draw, load, parser


def main(argv: Sequence[str] | None = None) -> None:
    """Load with 8-bit weights, save if asked, draw one picture."""
    arguments = parser(__doc__)
    arguments.add_argument("--save", type=Path, help="also write the quantised pipeline to this folder")
    given = arguments.parse_args(argv)
    config = Int8WeightOnlyConfig(version=2, set_inductor_config=False)  # which can be saved, and leaves torch as it is
    settings = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(config)})
    pipe = load(given.folder, quantization_config=settings)
    if given.save:
        pipe.save_pretrained(given.save)
    draw(pipe, given).save(given.out)


if __name__ == "__main__":
    main()
