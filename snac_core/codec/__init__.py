"""The codec: SNAC, with upstream's behaviour, and taps along its path."""

from snac_core.codec.codec import SNAC
from snac_core.codec.presets import PRESETS

__all__ = ["PRESETS", "SNAC"]
