"""Speaker encoders: speech to a unit vector per speaker, differentiable in the audio.

This module does not import torch; encoders are imported when they are requested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from snac_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder


__all__ = ["SpeakerEncoder", "load_speaker_encoder", "register_speaker_encoders"]


@hookimpl
def register_speaker_encoders(register: Callable[[type], None]) -> None:
    """Offer the built-in encoders."""
    from snac_core.speakers.ecapa import Ecapa, EcapaTiny
    from snac_core.speakers.eres2netv2 import ERes2NetV2, ERes2NetV2Map
    from snac_core.speakers.ge2e import GE2E
    from snac_core.speakers.simple import Simple
    from snac_core.speakers.wavlm import WavLMSV

    for encoder in (Ecapa, EcapaTiny, ERes2NetV2, ERes2NetV2Map, GE2E, Simple, WavLMSV):
        register(encoder)


def __getattr__(name: str) -> Any:
    if name == "SpeakerEncoder":
        from snac_core.speakers.encoder import SpeakerEncoder

        return SpeakerEncoder
    if name == "load_speaker_encoder":
        from snac_core.speakers.encoder import load_speaker_encoder

        return load_speaker_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
