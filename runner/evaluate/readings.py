"""What a recogniser read in a stretch of audio, remembered: no control's reading, and no source's, is made twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from runner.data.content import cache_folder
from snac_core import atomic


def remembered(recogniser: str, audio: Tensor, sample_rate: int, read: Callable[[], str]) -> str:
    """The reading of `audio` (T,), from the cache folder where it was made before.

    Args:
        recogniser: name and version, or digest: whatever changes when its readings may.
        audio: what is read.
        sample_rate: of `audio`, in Hz.
        read: makes the reading.
    """
    heard = hashlib.sha256(audio.contiguous().numpy().tobytes() + str(sample_rate).encode()).hexdigest()
    place = cache_folder() / "readings" / hashlib.sha256(recogniser.encode()).hexdigest()[:16] / f"{heard}.txt"
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass  # not made yet, or damaged
    text = read()
    with suppress(OSError):  # it only saves time
        atomic.write_text(place, text)
    return text
