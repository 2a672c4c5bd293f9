"""Constructor arguments of the released models (hubertsiuzdak/snac, issue 17)."""

from __future__ import annotations

from typing import Any

_ATTENTIVE: dict[str, Any] = {
    "encoder_dim": 64,
    "encoder_rates": [2, 3, 8, 8],
    "decoder_dim": 1536,
    "decoder_rates": [8, 8, 3, 2],
    "attn_window_size": 32,
    "codebook_size": 4096,
    "codebook_dim": 8,
    "vq_strides": [8, 4, 2, 1],
    "noise": True,
    "depthwise": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "snac_24khz": {
        "sampling_rate": 24000,
        "encoder_dim": 48,
        "encoder_rates": [2, 4, 8, 8],
        "decoder_dim": 1024,
        "decoder_rates": [8, 8, 4, 2],
        "attn_window_size": None,
        "codebook_size": 4096,
        "codebook_dim": 8,
        "vq_strides": [4, 2, 1],
        "noise": True,
        "depthwise": True,
    },
    "snac_32khz": {"sampling_rate": 32000, **_ATTENTIVE},
    "snac_44khz": {"sampling_rate": 44100, **_ATTENTIVE},
}
