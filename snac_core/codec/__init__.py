"""The codec: SNAC, with upstream's behaviour, and taps along its path."""

from snac_core.codec.pretrained import PRESETS
from snac_core.codec.snac import SNAC

__all__ = ["PRESETS", "SNAC"]
