"""What a test could change for the tests after it, as far as looking is cheap."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch.nn.modules import module as module_hooks
from torch.utils import flop_counter
from transformers.utils.logging import get_verbosity as verbosity

LOGGERS = ("", "ppcl", "torch", "diffusers")
SET_BY_OTHERS = (
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",  # by torch when it first compiles
    "CUDA_MODULE_LOADING",  # by torch before 2.9 when it first looks for a GPU
)
ADDED_BY_OTHERS = ("setuptools/_vendor", "huggingface/modules")  # to sys.path, by setuptools' import and by datasets'
HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
KERNELS = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")


def global_state() -> dict[str, Any]:
    """The state by name; of mappings the name is that of the entry, too."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "working directory": Path.cwd(),
        "umask": mask,
        "garbage collection": gc.isenabled(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "FLOP formulas": len(flop_counter.flop_registry),
        "diffusers' attention": attention_dispatch._AttentionBackendRegistry._active_backend,
        **{f"attention kernels: {name}": getattr(torch.backends.cuda, name)() for name in KERNELS},
        **{f"hooks of all modules: {name}": len(getattr(module_hooks, name)) for name in HOOKS},
        "log level: transformers": verbosity(),  # which sets it at its first use
        **{f"log level: {name or 'root'}": logging.getLogger(name).level for name in LOGGERS},
        **{f"sys.path: {entry}": True for entry in sys.path if not entry.endswith(ADDED_BY_OTHERS)},
        **{f"environment: {k}": v for k, v in os.environ.items() if k not in SET_BY_OTHERS},
        **dict.fromkeys(map("module: ".__add__, tuple(sys.modules)), False),
        **{
            f"module: {n}": id(m) for n, m in tuple(sys.modules.items()) if n.startswith("ppcl") and n[4:5] in (".", "")
        },
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs; modules that are new do no harm."""
    names = [name for name in {**before, **after} if name in before or not name.startswith("module: ")]
    return sorted(name for name in names if before.get(name) != after.get(name))
