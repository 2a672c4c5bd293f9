"""One digest of tensors, for codecs, encoders, strategies and recognisers alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_digest(tensors: Iterable[tuple[str, Tensor]], preamble: str = "") -> str:
    """sha256, in hex, over `preamble`, then each tensor's name, type, shape and bytes, in the order given."""
    digest = hashlib.sha256(preamble.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
