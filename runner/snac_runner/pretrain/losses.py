"""How far a codec's output is from speech: spectra at several resolutions, on both scales that hearing suggests."""

from __future__ import annotations

import math

import torch
import torchaudio
from torch import Tensor, nn

from snac_core.speakers.encoder import SpeakerEncoder

FLOOR = 1e-5
"""Magnitudes below -100 dB re a full-scale sine count as silence."""


BANDS = (10, 20, 40, 80, 128)
"""Mel bands of each window, short ones first: no band is without a bin."""


def windows(sample_rate: int) -> tuple[int, ...]:
    """Lengths in samples, short ones first."""
    shortest = 2 ** math.ceil(math.log2(0.008 * sample_rate))
    return tuple(shortest * 2**i for i in range(len(BANDS)))


class SpectralDistance(nn.Module):
    """Distances between spectra, each the mean over window lengths.

    Windows of 8 to 128 ms: at 16 kHz 128 to 2048 samples, at higher rates the next powers of two.

    Args:
        sample_rate: in Hz.

    Source: the mel terms are those of DAC (Kumar et al. 2023, section 3.4), the relative linear ones the spectral
    convergence of Yamamoto et al. 2020 in L1, item by item, so that quiet speech counts as much as loud.
    """

    terms = ("mel_log", "mel_linear", "stft_log", "stft_linear")

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.windows = windows(sample_rate)
        for window, count in zip(self.windows, BANDS, strict=True):
            filters = torchaudio.functional.melscale_fbanks(
                window // 2 + 1, 0.0, sample_rate / 2, count, sample_rate, norm=None, mel_scale="htk"
            )
            assert (filters.sum(0) > 0).all()
            self.register_buffer(f"filters_{window}", filters.T.contiguous(), persistent=False)
            # magnitudes are then those of sines, whatever the window
            self.register_buffer(f"window_{window}", _hann(window), persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        """(B, 1, T) twice to scalars: `mel_log` (in bels), `mel_linear`, `stft_log` (in bels), `stft_linear`."""
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
        spectrum = torch.stft(
            audio.squeeze(1), window, window // 4, window=self.get_buffer(f"window_{window}"), return_complex=True
        )
        # abs() of a complex zero has no useful gradient
        return (spectrum.real.square() + spectrum.imag.square() + (0.1 * FLOOR) ** 2).sqrt()


class SpeakerDistance(nn.Module):
    """How far the voice of an output is from that of its input, as a frozen speaker encoder hears it.

    Args:
        encoder: frozen; gradients pass through it to the audio.
        sample_rate: of the audio, in Hz.
    """

    def __init__(self, encoder: SpeakerEncoder, sample_rate: int) -> None:
        super().__init__()
        self.encoder = encoder
        # made once: the functional form copies a number to the device at each call, which cannot be recorded
        self.resample = torchaudio.transforms.Resample(sample_rate, encoder.sample_rate).to(encoder.device)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """(B, 1, T) twice to a scalar, 0 to 2; no gradient passes to the target."""
        with torch.no_grad():
            wanted = self._embed(target)
        near: Tensor = (self._embed(estimate) * wanted).sum(-1)
        return (1 - near).mean()

    def _embed(self, audio: Tensor) -> Tensor:
        embedding: Tensor = self.encoder(self.resample(audio), self.encoder.sample_rate)
        return embedding


def _hann(window: int) -> Tensor:
    hann = torch.hann_window(window)
    return hann / (hann.sum() / 2)
