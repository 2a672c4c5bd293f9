"""Audio files for the tests of the data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import soundfile


def write_tone(path: Path, seconds: float = 1.0, rate: int = 16000, hz: float | None = None, channels: int = 1) -> Path:
    """A tone of -14 dB whose pitch comes from the path, so that no two files are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pitch = hz or 100 + int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:3], "big") % 1_000_000 / 1000
    samples = 0.2 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.stack([samples] * channels, axis=1).astype(np.float32), rate)
    return path
