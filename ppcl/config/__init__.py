"""Settings: what there is (:mod:`ppcl.config.schema`), and how they are read (:mod:`ppcl.config.load`)."""

from ppcl.config.distill import DistillConfig
from ppcl.config.load import drawn_seeds, for_model, load_config, merge, parse_override, parse_seeds, parse_size
from ppcl.config.schema import (
    AnalyzeConfig,
    CaptureConfig,
    EvaluateConfig,
    ExportConfig,
    FitConfig,
    PlanConfig,
    RunConfig,
)

__all__ = [
    "AnalyzeConfig",
    "CaptureConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FitConfig",
    "PlanConfig",
    "RunConfig",
    "drawn_seeds",
    "for_model",
    "load_config",
    "merge",
    "parse_override",
    "parse_seeds",
    "parse_size",
]
