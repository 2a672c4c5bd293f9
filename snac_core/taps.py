"""Taps: the named places in a codec's signal path where a tensor (B, C, F) may be edited."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from snac_core.errors import UserError, nearest


@dataclass(frozen=True)
class Tap:
    """One place in the signal path, with the shape of what passes there.

    Attributes:
        name: `encoder_<i>`, `latent`, `quantized` or `decoder_<i>`.
        channels: C of the tensor (B, C, F) at this place.
        frame_rate: frames F per second of audio, in Hz.
    """

    name: str
    channels: int
    frame_rate: float


@dataclass(frozen=True)
class Taps:
    """What a strategy is told about the codec it will edit.

    Attributes:
        speaker_dim: S of the speaker embedding (B, S).
        all: every tap of the codec, in signal order.
    """

    speaker_dim: int
    all: tuple[Tap, ...]

    def match(self, patterns: Iterable[str]) -> list[Tap]:
        """The taps that any of the shell-style `patterns` names, in signal order.

        Raises:
            UserError: if a pattern matches no tap of this codec.
        """
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        names = [tap.name for tap in self.all]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"tap pattern {pattern!r} matches no tap of this codec{nearest(pattern, names)}")
        return [tap for tap in self.all if any(fnmatchcase(tap.name, pattern) for pattern in patterns)]


def is_before_vq(name: str) -> bool:
    """Whether the tap lies before the quantizer."""
    return name == "latent" or name.startswith("encoder_")
