"""The optimizer of both networks and its rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from runner.pretrain.settings import PretrainSettings


def rate(settings: PretrainSettings, step: int, peak: float) -> float:
    """Learning rate of a step: linear to the peak, then half a cosine."""
    if step < settings.lr_warmup:
        return peak * (step + 1) / settings.lr_warmup
    done = min(1.0, (step - settings.lr_warmup) / max(1, settings.steps - settings.lr_warmup))
    return peak * (settings.lr_min_ratio + (1 - settings.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    network: nn.Module, weight_decay: float, *, betas: tuple[float, float] = (0.8, 0.99), codebook_lr: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; `scale` of a group is its rate relative to the others'."""
    matrices, others, codebooks = [], [], []
    for name, parameter in network.named_parameters():
        if name.endswith("codebook.weight"):
            codebooks.append(parameter)
        elif parameter.numel() > max(parameter.shape) and not name.endswith("original0"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
        {"params": codebooks, "weight_decay": 0.0, "scale": codebook_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas)
