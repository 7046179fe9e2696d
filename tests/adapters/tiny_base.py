"""What the tiny models share: times, texts, weights that do something."""

from __future__ import annotations

import diffusers
import torch
from torch import randn

TIMES = torch.tensor([0.3, 0.7])
STEPS = torch.tensor([300, 700])
TEXT = (2, 5, 24)  # batch, tokens, features


def make(name, **config):
    model = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # modulations start at zero, and a fresh block would do nothing
                parameter.normal_(std=0.1)
    return model


def text_mask(dtype=torch.bool):
    mask = torch.ones(2, 5, dtype=dtype)
    mask[0, 3:] = 0
    return mask


def cog_inputs():
    pair = torch.tensor([[8, 8], [8, 8]])
    return {
        "hidden_states": randn(2, 4, 4, 4), "encoder_hidden_states": randn(TEXT), "timestep": STEPS,
        "original_size": pair, "target_size": pair, "crop_coords": torch.zeros(2, 2, dtype=torch.long),
    }  # fmt: skip
