"""Devices and precisions by name."""

from __future__ import annotations

import torch

from snac_core.errors import UserError, nearest

DEVICES = "auto, cpu, cuda, cuda:N or mps"


def device_named(name: str) -> torch.device:
    """A device by name; "auto" is the GPU where there is one (CUDA, else Apple's MPS), else the CPU.

    From then on, CUDA computes convolutions in float32 (torch's default is TF32), except where a block sets another
    precision.

    Raises:
        UserError: for an unknown device, or one that this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device {name!r}; expected {DEVICES}")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise UserError(f"device {name!r} asked for, but torch finds no such device on this machine; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} asked for, but this machine has {torch.cuda.device_count()} CUDA device(s)")
    torch.backends.cudnn.allow_tf32 = False
    return device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`; a copy to CUDA does not wait for the device, and uses pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
"""Names to values of the argument `autocast` of `SNAC.computing`."""


def precision_named(name: str) -> torch.dtype | None:
    """The argument `autocast` of `SNAC.computing` for a name; UserError for an unknown one."""
    if name not in PRECISIONS:
        raise UserError(f"no precision {name!r}{nearest(name, PRECISIONS)}; expected {' or '.join(PRECISIONS)}")
    return PRECISIONS[name]
