"""LoRA on the blocks that a plan keeps, so that the output stage can tune them with little memory and a small bundle.

W becomes W + B A with A (k, d) and B (o, k) of rank k (Hu et al. 2021, eq. 3; alpha = k). PEFT makes the layers. A
block with LoRA is a copy of the kept block's modules that holds the very same weights: the teacher beside it computes
what it did, and nothing large is there twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from ppcl.modules.parts import changed


def with_lora(
    block: nn.Module, rank: int, replaced: Mapping[str, Mapping[str, Any]], generator: torch.Generator
) -> nn.Module:
    """Return a block with LoRA on its linear layers.

    Args:
        block: A kept block; it is left as it is.
        rank: k.
        replaced: Its smaller modules by path, which are trained as they are.
        generator: On the CPU, for the first A; B starts at zero, so the block says what it did.

    Returns:
        A block that shares all weights with the given one; only the LoRA's and the smaller modules' are trainable.
    """
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    trained = [p for p in block.parameters() if p.requires_grad]
    new = changed(replaced)
    adapted = copy.deepcopy(block, shared)
    targets = [
        name
        for name, module in adapted.named_modules()
        if type(module) is nn.Linear and not any(f"{name}.".startswith(f"{path}.") for path in new)
    ]
    if not targets:
        return adapted
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapted)
    for parameter in trained:  # PEFT freezes everything but its own
        parameter.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                first = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(first, math.sqrt(5), generator=generator))
            if ".lora_" in name:
                parameter.data = parameter.data.float()
    return adapted


def factored(blocks: Iterable[nn.Module]) -> bool:
    """Whether any of some blocks has LoRA."""
    return any(hasattr(block, "peft_config") for block in blocks)


def load_factors(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block with LoRA the factors that :func:`factors` returned, by their layers' paths inside it."""
    set_peft_model_state_dict(block, dict(tensors))


def factors(blocks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The LoRA of some blocks.

    Args:
        blocks: By their path in the student, with or without LoRA.

    Returns:
        ``<layer>.lora_A.weight`` (k, d) and ``<layer>.lora_B.weight`` (o, k) by the layer's path in the student; layers
        that no gradient reached are left out.
    """
    tensors: dict[str, Tensor] = {}
    for path, block in blocks.items():
        if not factored([block]):
            continue
        of_block = {f"{path}.{name}": tensor.detach() for name, tensor in get_peft_model_state_dict(block).items()}
        for name, b in of_block.items():
            if ".lora_B." in name and b.any():
                other = name.replace(".lora_B.", ".lora_A.")
                tensors |= {other: of_block[other], name: b}
    return tensors
