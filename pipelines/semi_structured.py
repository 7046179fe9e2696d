"""Run 2:4-sparse linear layers with torch's semi-structured sparse kernels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ppcl.errors import ModelError, UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
AMPERE = (8, 0)  # the first compute capability whose tensor cores skip two of four


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of every four neighbours of a row at least two are zero; a weight of (o, i)."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight == 0).reshape(len(weight), -1, 4).sum(-1) >= 2).all())


def to_semi_structured(transformer: Any) -> list[str]:
    """Turn the 2:4-sparse weights of a transformer into torch's semi-structured sparse tensors, in place.

    Of each four weights two and their places are stored: 9/16 of the memory in half precision, and matrix products
    that skip the zeros. The transformer can then no longer be trained or saved; what was exported stays as it is.

    Args:
        transformer: A transformer on an NVIDIA GPU of compute capability 8.0 or newer, in float16 or bfloat16,
            compressed with ``sparsity.pattern=2:4``.

    Returns:
        The names of the layers whose weights were turned.

    Raises:
        UserError: The device or the dtype has no such kernels.
        ModelError: No layer has two zeros of every four, or none of them has a shape that the kernels take.
    """
    import torch
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    _check_place(next(transformer.parameters()))
    layers = {name: m for name, m in transformer.named_modules() if type(m) is nn.Linear and is_two_of_four(m.weight)}
    if not layers:
        raise ModelError(
            f"no linear layer of this {type(transformer).__name__} has two zeros of every four weights; "
            "compress with --set sparsity.pattern=2:4"
        )
    turned, problem = [], ""
    for name, layer in layers.items():
        try:
            sparse = to_sparse_semi_structured(layer.weight.detach().contiguous())
        except RuntimeError as error:  # a shape that the kernels do not take; torch says which ones
            problem = f"{name}: {error}".replace("\n", " ")
            continue
        layer.weight = nn.Parameter(sparse, requires_grad=False)
        turned.append(name)
    if not turned:
        raise ModelError(f"torch {torch.__version__} takes none of the 2:4 layers, e.g. {problem}; run them dense")
    if problem:
        logger.warning("%d of %d layers stay dense, e.g. %s", len(layers) - len(turned), len(layers), problem)
    return turned


def _check_place(weight: Tensor) -> None:
    """Make sure that there are kernels for where weights are and for their dtype.

    Raises:
        UserError: There are none.
    """
    import torch

    dense = "the dense weights with zeros run everywhere, no faster"
    if weight.device.type != "cuda" or torch.version.hip:
        raise UserError(f"2:4 kernels need an NVIDIA GPU, the transformer is on {weight.device}; {dense}")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < AMPERE:
        name = torch.cuda.get_device_name(weight.device)
        raise UserError(f"2:4 kernels need compute capability 8.0, {name} has {capability[0]}.{capability[1]}; {dense}")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"2:4 kernels need float16 or bfloat16 weights, got {weight.dtype}; load with dtype=torch.bfloat16"
        )
