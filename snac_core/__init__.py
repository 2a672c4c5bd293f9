"""snac_core: SNAC with hooks before the quantizer, after it, and in the loss.

Names are imported when first used: `import snac_core` alone imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snac_core.codec import SNAC as SNAC
    from snac_core.codec.streaming import ConversionStream as ConversionStream
    from snac_core.codec.streaming import DecoderStream as DecoderStream
    from snac_core.codec.streaming import EncoderStream as EncoderStream
    from snac_core.codec.tokens import TokenLayout as TokenLayout
    from snac_core.conditioned import ConditionedCodec as ConditionedCodec
    from snac_core.conditioned import Latents as Latents
    from snac_core.conditioned import Reconstruction as Reconstruction
    from snac_core.conditioning import Conditioning as Conditioning
    from snac_core.errors import UserError as UserError
    from snac_core.hookspecs import API_VERSION as API_VERSION
    from snac_core.hookspecs import hookimpl as hookimpl
    from snac_core.metric import Conversion as Conversion
    from snac_core.metric import Metric as Metric
    from snac_core.plugins import discover as discover
    from snac_core.speakers.encoder import SpeakerEncoder as SpeakerEncoder
    from snac_core.speakers.encoder import load_speaker_encoder as load_speaker_encoder
    from snac_core.step import Step as Step
    from snac_core.strategy import Strategy as Strategy
    from snac_core.taps import Tap as Tap
    from snac_core.taps import Taps as Taps


_HOMES = {
    "API_VERSION": "hookspecs",
    "SNAC": "codec.snac",
    "ConditionedCodec": "conditioned",
    "Conditioning": "conditioning",
    "Conversion": "metric",
    "ConversionStream": "codec.streaming",
    "DecoderStream": "codec.streaming",
    "EncoderStream": "codec.streaming",
    "Latents": "conditioned",
    "Metric": "metric",
    "Reconstruction": "conditioned",
    "SpeakerEncoder": "speakers.encoder",
    "Step": "step",
    "Strategy": "strategy",
    "Tap": "taps",
    "Taps": "taps",
    "TokenLayout": "codec.tokens",
    "UserError": "errors",
    "discover": "plugins",
    "hookimpl": "hookspecs",
    "load_speaker_encoder": "speakers.encoder",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
