"""Codecs of a few thousand parameters, for tests of contracts that do not depend on size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from snac_core.codec import SNAC

PLAIN: dict[str, Any] = {
    "sampling_rate": 16000,
    "encoder_dim": 4,
    "encoder_rates": [2, 3],
    "decoder_dim": 16,
    "decoder_rates": [3, 2],
    "attn_window_size": None,
    "codebook_size": 32,
    "codebook_dim": 4,
    "vq_strides": [4, 2, 1],
}
ATTENTIVE: dict[str, Any] = {**PLAIN, "encoder_dim": 16, "decoder_dim": 64, "attn_window_size": 8}


def small(**changes: Any) -> SNAC:
    """A small codec in eval mode, its parameters moved away from their initial values, where mistakes could hide."""
    codec = SNAC(**{**(ATTENTIVE if changes.pop("attentive", False) else PLAIN), **changes}).eval()
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return codec


def tone(batch: int = 2, samples: int = 240) -> torch.Tensor:
    """Noise of a voice's level, (B, 1, T)."""
    return 0.3 * torch.randn(batch, 1, samples)


def as_upstream_stores_it(codec: SNAC, folder: Path) -> Path:
    """config.json and pytorch_model.bin, no safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(codec.config))
    torch.save(codec.state_dict(), folder / "pytorch_model.bin")
    return folder
