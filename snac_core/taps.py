"""Taps: the named points of a codec's signal path at which a tensor (B, C, F) may be edited."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from snac_core.errors import UserError, nearest

if TYPE_CHECKING:
    from snac_core.codec.vq import ResidualVectorQuantize


@dataclass(frozen=True)
class Tap:
    """One point of the signal path, with the shape of the activation there.

    Attributes:
        name: `encoder_<i>`, `latent`, `quantized` or `decoder_<i>`.
        channels: C of the activation (B, C, F).
        frame_rate: frames F per second of audio, in Hz.
    """

    name: str
    channels: int
    frame_rate: float


@dataclass(frozen=True)
class Taps:
    """What a strategy needs to know about the codec.

    Attributes:
        speaker_dim: S of the speaker embedding (B, S).
        all: every tap of the codec, in signal order.
        quantizer: of the codec, frozen; None where only the shapes are known. Do not register it as a submodule.
    """

    speaker_dim: int
    all: tuple[Tap, ...]
    quantizer: ResidualVectorQuantize | None = None

    def match(self, patterns: Iterable[str]) -> list[Tap]:
        """The taps that match any of the shell-style `patterns`, in signal order.

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
    """Whether the tap is before the quantizer."""
    return name == "latent" or name.startswith("encoder_")
