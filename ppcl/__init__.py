"""ppcl: halve a diffusion transformer and get back a pipeline that drops into diffusers.

The names below are loaded when first used, so that ``import ppcl`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from ppcl.common.moved import install

__version__ = "0.2.0"
install()

_LAZY = {
    "open_run": "ppcl.run",
    "STAGES": "ppcl.run.stages",
    "RunConfig": "ppcl.config",
    "load_config": "ppcl.config",
    "CompressionPlan": "ppcl.student.plan",
    "load_pipeline": "ppcl.teacher.loading",
    "compress": "ppcl.api",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ppcl' has no attribute {name!r}")
