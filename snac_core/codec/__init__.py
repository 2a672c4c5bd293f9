"""The codec: SNAC, with the behaviour of the `snac` package, and taps."""

from snac_core.codec.pretrained import PRESETS
from snac_core.codec.snac import SNAC

__all__ = ["PRESETS", "SNAC"]
