"""Names that several rooms share, each list once. No torch here."""

from typing import Literal

STAGES = ("capture", "analyze", "fit", "plan", "distill", "export", "evaluate", "report")  # as they follow
BUDGETS = ("keep", "speedup", "fit_gb")  # settings of ``plan``, of which one counts
Width = Literal["modulation", "ffn", "attention", "text"]  # what of a block is made smaller
PICTURE_RUNS = 3  # timed drawings, at most: a picture takes long next to one transformer call, and varies less
WARMUP = 1  # calls before the timed ones, which do not count
TRANSFORMER = "transformer"  # its name in a pipeline; of two the first
TEACHER = "teacher"  # itself, as ``capture.sources``
BOTH = "both"  # of them, as ``capture.component``
PREFIX = "PPCL"  # of the names of classes with smaller modules
Start = Literal["first", "middle", "last", "mean"]  # the block of a run, or their mean, that a substitute starts from
Quantize = Literal["none", "int8", "fp8", "nvfp4", "int4", "nf4"]  # the format of an exported transformer
