"""Distance of the converted output to the target's own recording of the same sentence, where there is one.

Output and recording are aligned by dynamic time warping of their mel-cepstra. `snac_core.losses` aligns parts of
recordings for training; an alignment with free ends would accept an output that holds one sound of the recording.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.functional import create_dct

from snac_core.metric import Conversion, Metric
from snac_core.spectral import mel_filterbank, power_spectrum
from snac_runner.data.audio import resample
from snac_runner.evaluate.prosody import MIN_VOICED, OCTAVE, STEP, pitch

RATE = 16000  # Hz
WINDOW = 400  # samples, 25 ms
HOP = 160  # samples: STEP seconds, as the contours of F0
BANDS = 80
ORDER = 13
POWER_FLOOR = 1e-10
SPEECH = 40.0  # dB: quieter frames, relative to the loudest of the recording, are pauses
DECIBELS = 10 / math.log(10)

Array = NDArray[np.float64]


class MCD(Metric):
    """Mel-cepstral distortion (Kubichek 1993) to the target's recording of the same sentence, in dB.

    At 16 kHz: ln power in 80 mel bands (windows of 25 ms every 10 ms), its cosine transform, coefficients 1 to 13 (as
    Battenberg et al. 2020, arXiv 1910.10288); coefficient 0 is the level. Frames are aligned by dynamic time warping
    over the whole of both, with steps (1,0), (0,1) and (1,1) of equal weight (Sakoe and Chiba 1978). The value is the
    mean over the aligned pairs in which the recording does not pause: (10 / ln 10) sqrt(2 sum_d (c_d - c'_d)^2).
    """

    name, unit, direction, worst = "mcd", "dB", "down", 30.0
    outputs, references = ("converted",), ("parallel",)

    def __call__(self, conversion: Conversion) -> float | None:
        found = _aligned(conversion)
        return None if found is None else min(self.worst, float(found.distances.mean()))


class F0RMSE(Metric):
    """Root mean square difference of log F0 to the target's recording of the same sentence, in semitones, at most 24.

    It is taken over the aligned pairs of frames (see MCD) that are voiced in both; 24 if fewer than five are, and None
    if fewer than five frames of the recording are voiced.
    """

    name, unit, direction, worst, requires = "f0_rmse", "semitones", "down", 24.0, ("parselmouth",)
    outputs, references = ("converted",), ("parallel",)

    def __call__(self, conversion: Conversion) -> float | None:
        found = _aligned(conversion)
        if found is None or conversion.parallel is None:
            return None
        rate = conversion.sample_rate
        wanted = _pitch_at_frames(conversion.parallel, rate)
        if (wanted > 0).sum() < MIN_VOICED:
            return None
        got, wanted = _pitch_at_frames(conversion.converted, rate)[found.output], wanted[found.recording]
        both = (got > 0) & (wanted > 0)
        if both.sum() < MIN_VOICED:
            return self.worst
        return min(self.worst, OCTAVE * float(np.sqrt(np.square(np.log2(got[both] / wanted[both])).mean())))


class Alignment(NamedTuple):
    """Pairs of frames of an output and of a recording, without the pauses of the recording.

    Attributes:
        output, recording: indices (P,) of frames, ascending.
        distances: mel-cepstral distortion (P,) of the pairs, in dB.
    """

    output: NDArray[np.intp]
    recording: NDArray[np.intp]
    distances: Array


def _aligned(conversion: Conversion) -> Alignment | None:
    """None if the target has no recording of the sentence, or the output should not say it."""
    if conversion.parallel is None or not conversion.same_words:
        return None
    output, recording = (audio.float().numpy().tobytes() for audio in (conversion.converted, conversion.parallel))
    return _align(output, recording, conversion.sample_rate)


@lru_cache(maxsize=4)
def _align(output: bytes, recording: bytes, sample_rate: int) -> Alignment:
    """Cached, because two metrics need it."""
    got, wanted = (
        mel_cepstra(torch.frombuffer(bytearray(samples), dtype=torch.float32), sample_rate)
        for samples in (output, recording)
    )
    one, other = warping_path(distortions(got, wanted))
    levels = DECIBELS * wanted[:, 0]  # dB, the mean over bands
    spoken = levels[other] > levels.max() - SPEECH
    one, other = one[spoken], other[spoken]
    return Alignment(one, other, DECIBELS * np.sqrt(2 * np.square(got[one, 1:] - wanted[other, 1:]).sum(1)))


def mel_cepstra(audio: Tensor, sample_rate: int) -> Array:
    """Mel-cepstra (K, ORDER + 1) of audio (T,): frame k is centred on second k * STEP.

    With N bands, ln P_n = c_0 + 2 sum_d c_d cos(pi d (n + 1/2) / N): with all coefficients but c_0, the distortion is
    the root mean square difference of the spectra in dB.
    """
    wave = resample(audio, sample_rate, RATE)
    power = power_spectrum(wave[None].double(), torch.hann_window(WINDOW).double(), HOP, padding="constant")[0]
    mel = mel_filterbank(BANDS, 2 * (power.shape[0] - 1), RATE).double() @ power
    logs = torch.log(mel + POWER_FLOOR).T  # (K, BANDS)
    cepstra: Array = (logs @ create_dct(ORDER + 1, BANDS, norm=None).double() / (2 * BANDS)).numpy()
    return cepstra


def distortions(one: Array, other: Array) -> Array:
    """Mel-cepstral distortion (K, J) in dB of all pairs of frames of two cepstra (K, ORDER + 1), (J, ORDER + 1)."""
    a, b = (torch.from_numpy(np.ascontiguousarray(cepstra[:, 1:])) for cepstra in (one, other))
    found: Array = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return DECIBELS * math.sqrt(2) * found


def warping_path(cost: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The path of lowest total cost from (0, 0) to (K - 1, J - 1) by steps (1,0), (0,1) and (1,1); cost (K, J).

    A row of totals is D_j = c_j + min(D_{j-1}, m_j), where m_j is the least total of the row above that leads to j.
    With the running sum s of the row's costs, D_j = s_j + min_{i <= j} (m_i - s_{i-1}): whole rows at once.

    Returns:
        indices (P,) of rows and of columns.
    """
    total = np.empty_like(cost)
    total[0] = np.cumsum(cost[0])
    for row in range(1, len(cost)):
        above = total[row - 1]
        entering = np.minimum(above, np.concatenate([[np.inf], above[:-1]]))
        sums = np.cumsum(cost[row])
        total[row] = sums + np.minimum.accumulate(entering - (sums - cost[row]))
    k, j = cost.shape[0] - 1, cost.shape[1] - 1
    path = [(k, j)]
    while k or j:
        steps = [(k - 1, j - 1), (k - 1, j), (k, j - 1)]
        k, j = min((step for step in steps if min(step) >= 0), key=lambda step: total[step])
        path.append((k, j))
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def _pitch_at_frames(audio: Tensor, sample_rate: int) -> Array:
    """F0 of audio (T,) in Hz at the frames of `mel_cepstra` (K,), 0 where unvoiced; the nearest value of Praat's.

    Praat centres its contour in the audio, and has no values within half a window of its ends.
    """
    contour = pitch(audio, sample_rate)
    seconds = len(audio) / sample_rate
    frames = 1 + round(len(audio) * RATE / sample_rate) // HOP
    first = (seconds - STEP * (len(contour) - 1)) / 2
    nearest = np.rint((np.arange(frames) * STEP - first) / STEP).astype(int)
    inside = (nearest >= 0) & (nearest < len(contour))
    return np.where(inside, contour[nearest.clip(0, len(contour) - 1)], 0.0)
