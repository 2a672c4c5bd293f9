"""Distances between waveforms: multi-scale STFT and log-mel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torchaudio
from torch import Tensor, nn

FLOOR = 1e-5
"""Magnitudes below -100 dB count as silence in the logarithm."""


class MultiScaleSTFT(nn.Module):
    """Mean L1 distance of magnitudes plus that of log-magnitudes, over several window lengths.

    Args:
        n_ffts: window lengths in samples; Hann windows, hop a quarter of the window.

    Source: the spectral terms of Yamamoto et al. 2020 (Parallel WaveGAN), with L1 in both domains.
    """

    def __init__(self, n_ffts: Sequence[int] = (1024, 2048, 4096)) -> None:
        super().__init__()
        self.n_ffts = tuple(n_ffts)
        for n_fft in self.n_ffts:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def magnitudes(self, audio: Tensor, n_fft: int) -> Tensor:
        """(B, 1, T) to (B, n_fft / 2 + 1, frames). Short audio is padded to one window."""
        wave = audio.squeeze(1)
        if wave.shape[-1] < n_fft:
            wave = nn.functional.pad(wave, (0, n_fft - wave.shape[-1]))
        spectrum = torch.stft(
            wave, n_fft, n_fft // 4, window=self.get_buffer(f"window_{n_fft}"), return_complex=True, pad_mode="constant"
        )
        # abs() of a complex zero has no useful gradient; the floor keeps silence finite
        return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt()

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """(B, 1, T) twice to a scalar."""
        total = estimate.new_zeros(())
        for n_fft in self.n_ffts:
            got, wanted = self.magnitudes(estimate, n_fft), self.magnitudes(target, n_fft)
            total = total + (got - wanted).abs().mean() + (got.log10() - wanted.log10()).abs().mean()
        return total / len(self.n_ffts)


def mel_distance(estimate: Tensor, target: Tensor, sample_rate: int, *, n_mels: int = 80) -> Tensor:
    """Mean absolute difference of log10 mel spectra, per item: (B, 1, T) twice to (B,).

    Windows of 64 ms with a hop of 16 ms, Slaney filters up to half the rate.
    """
    n_fft = 2 ** round(math.log2(0.064 * sample_rate))
    transform = _mel(sample_rate, n_fft, n_mels)
    got, wanted = (transform(x.squeeze(1).cpu().float()).clamp(min=FLOOR).log10() for x in (estimate, target))
    distance: Tensor = (got - wanted).abs().mean(dim=(1, 2))
    return distance


@lru_cache(maxsize=8)
def _mel(sample_rate: int, n_fft: int, n_mels: int) -> torchaudio.transforms.MelSpectrogram:
    return torchaudio.transforms.MelSpectrogram(
        sample_rate, n_fft, hop_length=n_fft // 4, n_mels=n_mels, power=1.0, norm="slaney", mel_scale="slaney"
    )
