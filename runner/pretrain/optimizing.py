"""The optimizer of both networks and its rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from runner.pretrain.settings import PretrainSettings

_OF_THE_DEVICE = ("lr", "fused", "foreach", "capturable")  # in an optimizer's groups


def rate(settings: PretrainSettings, step: int, peak: float) -> float:
    """Learning rate of a step: linear to the peak, then half a cosine."""
    if step < settings.lr_warmup:
        return peak * (step + 1) / settings.lr_warmup
    done = min(1.0, (step - settings.lr_warmup) / max(1, settings.steps - settings.lr_warmup))
    return peak * (settings.lr_min_ratio + (1 - settings.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    network: nn.Module, weight_decay: float, *, betas: tuple[float, float] = (0.8, 0.99), codebook_lr: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; `scale` of a group is its rate relative to the others'.

    On an accelerator a step of it can be recorded: rates are tensors, and one kernel moves a group.
    """
    matrices, others, codebooks = [], [], []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("codebook.weight"):
            codebooks.append(parameter)
        elif parameter.numel() > max(parameter.shape) and not name.endswith("original0"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
        {"params": codebooks, "weight_decay": 0.0, "scale": codebook_lr},
    ]
    device = next(network.parameters()).device
    on_cuda = device.type == "cuda"
    for group in groups:
        group["lr"] = torch.zeros((), device=device) if on_cuda else 0.0
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=betas, fused=on_cuda or None, capturable=on_cuda
    )


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What an optimizer remembers, from whatever device; how it computes stays as this device wants it."""
    own = [{key: group[key] for key in _OF_THE_DEVICE} for group in optimizer.param_groups]
    groups = [{**group, **kept} for group, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_rate(optimizer: torch.optim.Optimizer, peak: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(peak * group["scale"])
        else:
            group["lr"] = peak * group["scale"]
