"""Prosody of the converted output, by Praat: is the F0 contour the source's, and the mean F0 the target's?"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from snac_core.metric import Conversion, Metric

STEP = 0.01  # s between pitch values
LOWEST, HIGHEST = 60.0, 500.0  # Hz
MIN_VOICED = 5  # frames that a correlation or a mean needs
OCTAVE = 12.0  # in semitones


class F0Correlation(Metric):
    """Pearson correlation of the log-F0 contours of output and source in frames where both are voiced.

    A change of mean F0 does not lower it (a plain F0 distance would penalise correct conversion). It is 0 if fewer than
    five frames are voiced in both, and None if fewer are in the source.
    """

    name, unit, direction, worst, requires = "f0_correlation", "r", "up", -1.0, ("parselmouth",)
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        if not conversion.same_words:
            return None
        source, output = _contours(conversion)
        if (source > 0).sum() < MIN_VOICED:
            return None
        both = (source > 0) & (output > 0)
        if both.sum() < MIN_VOICED:
            return 0.0
        a, b = np.log(source[both]), np.log(output[both])
        spread = float(a.std() * b.std())
        return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1e-9 else 0.0


class F0Error(Metric):
    """Distance of the output's mean log-F0 to the target speaker's, in semitones; 24 if nothing is voiced."""

    name, unit, direction, worst, requires = "f0_error", "semitones", "down", 24.0, ("parselmouth",)
    outputs, references = ("converted",), ("target",)

    def __call__(self, conversion: Conversion) -> float | None:
        if conversion.target is None:
            return None
        target, output = (
            mean_log2(audio, conversion.sample_rate) for audio in (conversion.target, conversion.converted)
        )
        if target is None:
            return None
        return self.worst if output is None else min(self.worst, OCTAVE * abs(output - target))


class VoicingError(Metric):
    """Share of the source's frames that are voiced in either output or source, but not in both."""

    name, unit, direction, worst, requires = "voicing_error", "share", "down", 1.0, ("parselmouth",)
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        if not conversion.same_words:
            return None
        source, output = (pitch(wave, conversion.sample_rate) > 0 for wave in (conversion.source, conversion.converted))
        missing = max(0, len(source) - len(output))  # frames after the end of the output count as unvoiced
        padded = np.pad(output, (0, missing))[: len(source)]
        return float((source != padded).mean()) if len(source) else None


def pitch(audio: Tensor, sample_rate: int) -> NDArray[np.float64]:
    """F0 of audio (T,) in Hz every 10 ms, 0 where unvoiced (autocorrelation, Boersma 1993)."""
    return _pitch(audio.float().numpy().tobytes(), sample_rate)


@lru_cache(maxsize=64)
def _pitch(samples: bytes, sample_rate: int) -> NDArray[np.float64]:
    """Cached, because three metrics need the contours of the same conversion."""
    import parselmouth

    sound = parselmouth.Sound(np.frombuffer(samples, np.float32).astype(np.float64), sampling_frequency=sample_rate)
    found: NDArray[np.float64] = sound.to_pitch(STEP, LOWEST, HIGHEST).selected_array["frequency"]
    found.flags.writeable = False
    return found


def mean_log2(audio: Tensor, sample_rate: int) -> float | None:
    """Mean of log2 F0 (Hz) over the voiced frames of audio (T,); None if there are fewer than five."""
    contour = pitch(audio, sample_rate)
    voiced = contour[contour > 0]
    return float(np.log2(voiced).mean()) if len(voiced) >= MIN_VOICED else None


def _contours(conversion: Conversion) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    source, output = (pitch(audio, conversion.sample_rate) for audio in (conversion.source, conversion.converted))
    frames = min(len(source), len(output))
    return source[:frames], output[:frames]
