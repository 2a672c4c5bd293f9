"""Recipes: which codec, and how it is trained."""

from __future__ import annotations

from typing import Any

from runner.pretrain.settings import PretrainSettings
from snac_core.codec import PRESETS as RELEASED
from snac_core.errors import UserError, nearest
from snac_core.settings import checked

TINY: dict[str, Any] = {
    "sampling_rate": 16000,
    "encoder_dim": 16,
    "encoder_rates": [4, 4, 5, 2],
    "decoder_dim": 384,
    "decoder_rates": [2, 5, 4, 4],
    "attn_window_size": None,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": False,
}
"""A base for CPUs: 3.7 M parameters, 16 kHz, codes at 25, 50 and 100 Hz, 1.75 kbps."""

_LARGE: dict[str, Any] = {
    "synthetic": 0,
    "steps": 400_000,
    "batch": 16,
    "lr": 3e-4,
    "lr_warmup": 1000,
    "lr_min_ratio": 0.05,
    "quantiser": {"continuous": 2000, "blend": 2000, "kmeans_batches": 64, "restart_every": 200},
    "adversary": {"after": 10_000, "rise": 5000, "lr": 3e-4},
    "listen_every": 5000,
    "log_every": 100,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    # crops hold a whole number of the coarsest code's frames and, at 32 and 44 kHz, of attention windows
    "snac_24khz": {**_LARGE, "crop_seconds": 18 * 2048 / 24000},
    "snac_32khz": {**_LARGE, "crop_seconds": 4 * 12288 / 32000},
    "snac_44khz": {**_LARGE, "crop_seconds": 5 * 12288 / 44100},
}
PRESETS = tuple(_RECIPES)


def recipe(name: str, **changes: Any) -> PretrainSettings:
    """The settings of a preset, with changes by field.

    Args:
        name: tiny, or snac_24khz, snac_32khz or snac_44khz: upstream's sizes. To fine-tune released weights add
            `start="hubertsiuzdak/snac_24khz"`, a lower `lr`, and `quantiser={"continuous": 0, "blend": 0}`.
        changes: fields of PretrainSettings; nested ones as mappings, which change single entries.

    Raises:
        UserError: for an unknown preset, or a field that is unknown or has no such value.
    """
    if name not in _RECIPES:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    fields = {"codec": name, **_RECIPES[name]}
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if both else value
    settings: PretrainSettings = checked(PretrainSettings, fields, f"the preset {name!r}")
    return settings


def codec_config(name: str) -> dict[str, Any] | str:
    """What SNAC.from_config takes for a preset's name or a file."""
    return dict(TINY) if name == "tiny" else dict(RELEASED[name]) if name in RELEASED else name
