"""What a recogniser reads in audio, remembered (no control's reading is made twice), and how much of it is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from runner.data.content import cache_folder
from runner.error_rate import error_rate
from snac_core import atomic
from snac_core.metric import Conversion


def errors(
    conversion: Conversion, units: Callable[[str], Sequence[str]], hear: Callable[[Tensor, int], Sequence[str]]
) -> float | None:
    """Error rate of the converted output, at most 1: against the text where it is known, else as the source is heard.

    Args:
        conversion: to be judged.
        units: of a text, what is counted: words, characters, phones.
        hear: a recogniser, from audio (T,) and its rate to such units.

    Returns:
        None where the output says something else, or nothing is heard in the source.
    """
    if not conversion.same_words:
        return None
    rate = conversion.sample_rate
    said = units(conversion.text) if conversion.text else hear(conversion.source, rate)
    return error_rate(said, hear(conversion.converted, rate)) if said else None


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
