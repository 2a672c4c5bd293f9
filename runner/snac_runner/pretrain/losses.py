"""Reconstruction losses of a codec: multi-resolution spectral distances and a speaker distance."""

from __future__ import annotations

import math

import torch
import torchaudio
from torch import Tensor, nn

from snac_core.speakers.encoder import SpeakerEncoder
from snac_core.spectral import magnitude_spectrum, mel_filterbank

FLOOR = 1e-5
"""Floor of magnitudes: -100 dB relative to a full-scale sine."""

BANDS = (10, 20, 40, 80, 128)
"""Mel bands per window length, shortest window first; every band contains a bin."""


def windows(sample_rate: int) -> tuple[int, ...]:
    """Window lengths in samples, shortest first."""
    shortest = 2 ** math.ceil(math.log2(0.008 * sample_rate))
    return tuple(shortest * 2**i for i in range(len(BANDS)))


class SpectralDistance(nn.Module):
    """Distances between magnitude spectra, averaged over window lengths.

    Windows have 8 to 128 ms, 128 to 2048 samples at 16 kHz; at higher rates the next powers of two.

    Args:
        sample_rate: in Hz.

    Source: the mel terms follow DAC (Kumar et al. 2023, section 3.4). The linear terms are the spectral convergence of
    Yamamoto et al. 2020 with L1 norms, per item, so that quiet and loud speech have the same weight.
    """

    terms = ("mel_log", "mel_linear", "stft_log", "stft_linear")

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.windows = windows(sample_rate)
        for window, count in zip(self.windows, BANDS, strict=True):
            filters = mel_filterbank(count, window, sample_rate, scale="htk", area_norm=False)
            assert (filters.sum(1) > 0).all()
            self.register_buffer(f"filters_{window}", filters, persistent=False)
            self.register_buffer(f"window_{window}", _hann(window), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Scalars `mel_log` (in bels), `mel_linear`, `stft_log` (in bels), `stft_linear`.

        Args:
            estimate, target: (B, 1, T).
        """
        sums: dict[str, Tensor] = {}
        for window in self.windows:
            got, wanted = self._magnitudes(estimate, window), self._magnitudes(target, window)
            filters = self.get_buffer(f"filters_{window}")
            for name, a, b in (("stft", got, wanted), ("mel", filters @ got, filters @ wanted)):
                logarithmic = ((a + FLOOR).log10() - (b + FLOOR).log10()).abs().mean()
                linear = ((a - b).abs().mean((1, 2)) / b.mean((1, 2)).clamp(min=FLOOR)).mean()
                sums[f"{name}_log"] = sums.get(f"{name}_log", 0.0) + logarithmic
                sums[f"{name}_linear"] = sums.get(f"{name}_linear", 0.0) + linear
        return {name: total / len(self.windows) for name, total in sums.items()}

    def _magnitudes(self, audio: Tensor, window: int) -> Tensor:
        hann = self.get_buffer(f"window_{window}")
        return magnitude_spectrum(audio.squeeze(1), hann, window // 4, padding="reflect", floor=0.1 * FLOOR)


class SpeakerDistance(nn.Module):
    """1 - cosine of the embeddings of two signals, by a frozen speaker encoder.

    Args:
        encoder: frozen; gradients pass through it to the audio.
        sample_rate: of the audio, in Hz.
    """

    def __init__(self, encoder: SpeakerEncoder, sample_rate: int) -> None:
        super().__init__()
        self.encoder = encoder
        # functional.resample copies a scalar to the device in each call, which a CUDA graph cannot capture
        self.resample = torchaudio.transforms.Resample(sample_rate, encoder.sample_rate).to(encoder.device)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """A scalar, 0 to 2, for `estimate` and `target` (B, 1, T); no gradient reaches the target."""
        with torch.no_grad():
            wanted = self._embed(target)
        near: Tensor = (self._embed(estimate) * wanted).sum(-1)
        return (1 - near).mean()

    def _embed(self, audio: Tensor) -> Tensor:
        embedding: Tensor = self.encoder(self.resample(audio), self.encoder.sample_rate)
        return embedding


def _hann(window: int) -> Tensor:
    """A Hann window with which a full-scale sine has magnitude 1."""
    hann = torch.hann_window(window)
    return hann / (hann.sum() / 2)
