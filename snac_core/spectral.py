"""Short-time Fourier transforms and mel filterbanks: the one place for the front-ends of losses, encoders and metrics.

All transforms use centred frames: frame k is centred on sample k * hop, and the audio is padded by half a window on
either side. All filterbanks have the shape (bands, n_fft // 2 + 1) and are applied as `filterbank @ spectrum`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torchaudio
from torch import Tensor

Padding = Literal["constant", "reflect"]


def stft(audio: Tensor, window: Tensor, hop: int, *, padding: Padding, normalized: bool = False) -> Tensor:
    """Complex spectra of centred frames.

    Args:
        audio: (B, T).
        window: (n_fft,), of the audio's dtype and on its device.
        hop: samples between frames.
        padding: how half a window is padded on either side: with zeros, or reflected, which needs T > n_fft // 2.
        normalized: divide by sqrt(n_fft).

    Returns:
        (B, n_fft // 2 + 1, T // hop + 1).
    """
    return torch.stft(
        audio, window.numel(), hop, window=window, pad_mode=padding, normalized=normalized, return_complex=True
    )


def power_spectrum(audio: Tensor, window: Tensor, hop: int, *, padding: Padding) -> Tensor:
    """|STFT|^2: (B, T) to (B, n_fft // 2 + 1, T // hop + 1), differentiable everywhere. Arguments as `stft`."""
    spectrum = stft(audio, window, hop, padding=padding)
    return spectrum.real.square() + spectrum.imag.square()


def magnitude_spectrum(audio: Tensor, window: Tensor, hop: int, *, padding: Padding, floor: float) -> Tensor:
    """sqrt(|STFT|^2 + floor^2): (B, T) to (B, n_fft // 2 + 1, T // hop + 1). Other arguments as `stft`.

    A positive `floor` bounds the gradient: the gradient of |x| is undefined at zero, in silence.
    """
    return (power_spectrum(audio, window, hop, padding=padding) + floor**2).sqrt()


def mel_filterbank(
    bands: int,
    n_fft: int,
    sample_rate: int,
    *,
    low: float = 0.0,
    high: float | None = None,
    scale: Literal["slaney", "htk"] = "slaney",
    area_norm: bool = True,
) -> Tensor:
    """Triangular mel filters, linear in Hz (torchaudio's `melscale_fbanks`).

    The defaults are those of librosa.

    Args:
        bands: number of filters.
        n_fft: window length in samples.
        sample_rate: in Hz.
        low, high: edges of the lowest and highest filter in Hz; `high` defaults to half the sample rate.
        scale: Slaney's mel scale (linear below 1 kHz), or HTK's (2595 log10(1 + f / 700)).
        area_norm: scale every filter to unit area (Slaney's norm); False: unit height.

    Returns:
        (bands, n_fft // 2 + 1).
    """
    filters: Tensor = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1,
        low,
        sample_rate / 2 if high is None else high,
        bands,
        sample_rate,
        norm="slaney" if area_norm else None,
        mel_scale=scale,
    )
    return filters.T.contiguous()


def kaldi_filterbank(bands: int, n_fft: int, sample_rate: int, *, low: float, high: float) -> Tensor:
    """Kaldi's filters, of unit height and linear in mel = 1127 ln(1 + f / 700): (bands, n_fft // 2 + 1).

    After kaldi/src/feat/mel-computations.cc. torchaudio's `melscale_fbanks` is linear in Hz, which differs by up to
    0.004; its `compliance.kaldi.get_mel_banks` computes the edges in float32, which differs by up to 1.4e-5.
    """

    def mel(frequency: Tensor) -> Tensor:
        return 1127.0 * (1.0 + frequency / 700.0).log()

    edges = torch.linspace(0, 1, bands + 2, dtype=torch.float64)
    first, last = mel(torch.tensor([low, high], dtype=torch.float64))
    left, centre, right = (first + (last - first) * edges).unfold(0, bands, 1)[:, :, None]
    bins = mel(torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft)
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0).float()


def speechbrain_filterbank(bands: int, n_fft: int, sample_rate: int) -> Tensor:
    """SpeechBrain's filters on HTK's scale, of unit height, from 0 Hz to half the rate: (bands, n_fft // 2 + 1).

    After speechbrain.lobes.features.Fbank: both slopes of a triangle have the width of its lower one. Standard
    triangles (`mel_filterbank`) differ by up to 0.03, and the released ECAPA-TDNN was trained on these.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    centre, width = edges[1:-1, None], (edges[1:] - edges[:-1])[:-1, None]
    slope = (torch.linspace(0, sample_rate // 2, n_fft // 2 + 1) - centre) / width
    return (1 - slope.abs()).clamp(min=0)
