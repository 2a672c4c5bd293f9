"""AdamW for a codec or its discriminators, and moving its state between devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_DEVICE_OPTIONS = ("lr", "fused", "foreach", "capturable")  # of a parameter group; they depend on the device


def adamw(
    network: nn.Module, weight_decay: float, *, betas: tuple[float, float] = (0.8, 0.99), codebook_lr: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; its learning rates are 0 until `set_learning_rate`.

    On a CUDA device a CUDA graph can capture a step of it: learning rates are tensors, and the kernels are fused.

    Args:
        network: its trainable parameters are optimized.
        weight_decay: of weight matrices. Biases, gains of weight normalization and codebooks have none.
        betas: of AdamW.
        codebook_lr: learning rate of codebooks relative to the others; the key `scale` of their parameter group.
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the group's `scale`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr * group["scale"])
        else:
            group["lr"] = lr * group["scale"]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict that may come from another device; options that depend on the device are not changed."""
    own = [{key: group[key] for key in _DEVICE_OPTIONS} for group in optimizer.param_groups]
    groups = [{**group, **options} for group, options in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
