"""Which optimizer trains what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ppcl.errors import TrainingError
from ppcl.training.eight_bit import new_adamw8bit

if TYPE_CHECKING:
    from ppcl.training.settings import LoopSettings


def new_optimizers(
    parameters: Mapping[str, nn.Parameter], matrices: set[int], settings: LoopSettings
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices (given by ``id``) and AdamW for the rest."""
    if settings.muon_learning_rate and not hasattr(torch.optim, "Muon"):
        raise TrainingError(f"torch {torch.__version__} has no Muon optimizer; install torch 2.9 or newer")
    by_muon = [p for p in parameters.values() if settings.muon_learning_rate and id(p) in matrices]
    rest = [p for p in parameters.values() if not settings.muon_learning_rate or id(p) not in matrices]
    found: list[torch.optim.Optimizer] = []
    if rest and settings.optimizer == "adamw8bit":
        found.append(new_adamw8bit(rest, settings.learning_rate, settings.betas, settings.weight_decay))
    elif rest:
        found.append(
            torch.optim.AdamW(
                rest,
                lr=settings.learning_rate,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=True,
            )
        )
    if by_muon:
        # the update is scaled to AdamW's typical size, so that weight decay and rates keep their meaning
        found.append(
            torch.optim.Muon(
                by_muon,
                lr=settings.muon_learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = float(group["lr"])
    return found
