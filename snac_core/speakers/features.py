"""Kaldi's log-mel filterbank, batched and differentiable, as ERes2NetV2 was trained on it.

The log-mel features of this project's own encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snac_core.spectral import kaldi_filterbank, mel_filterbank, power_spectrum

_EPSILON = torch.finfo(torch.float32).eps


class KaldiFbank(nn.Module):
    """Log energies of triangular bands on Kaldi's mel scale, without dither, for audio of full scale 1.

    Frames of 25 ms every 10 ms lie whole within the audio. Each loses its mean, is pre-emphasised (0.97, its first
    sample against itself), windowed ("povey": Hann to the power 0.85), and filled up with zeros to 512 samples. After
    kaldi/src/feat/feature-window.cc and mel-computations.cc.
    """

    def __init__(self, bands: int = 80, sample_rate: int = 16000, *, low: float = 20.0) -> None:
        super().__init__()
        self.size = sample_rate * 25 // 1000
        self.hop = sample_rate * 10 // 1000
        self.fft = 1 << (self.size - 1).bit_length()
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(self.size, periodic=False).pow(0.85), persistent=False)
        filters = kaldi_filterbank(bands, self.fft, sample_rate, low=low, high=sample_rate / 2)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, T) -> (B, bands, F) with F = 1 + (T - 400) // 160 at 16 kHz."""
        frames = audio.unfold(-1, self.size, self.hop)  # (B, F, 400)
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(frames * self.window, self.fft)
        power = spectrum.real.square() + spectrum.imag.square()
        energies: Tensor = (power @ self.filters.T).clamp(min=_EPSILON).log()
        return energies.transpose(1, 2)


class LogMel(nn.Module):
    """Log-mel bands that depend on neither the level nor the steady colour of the audio.

    The audio is scaled to unit RMS first, and each band's mean over time is taken off last. `floor` is added to the
    band powers before the log, about 50 dB under those of speech: what lies under it is silence, and the gradient of
    the log stays bounded there.
    """

    def __init__(self, bands: int, sample_rate: int, *, window: int = 400, hop: int = 160, floor: float = 1e-3) -> None:
        super().__init__()
        self.hop = hop
        self.floor = floor
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        filters = mel_filterbank(bands, window, sample_rate, low=20.0, high=sample_rate / 2 - 400)
        # Unit mean power per band for white noise of unit RMS, so that `floor` has a meaning.
        power = self.window.square().sum()
        self.register_buffer("filters", filters / filters.T.contiguous().sum(0)[:, None] / power, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, T) -> (B, bands, T // hop + 1)."""
        level = audio.square().mean(-1, keepdim=True)
        audio = audio * (level + 1e-10).rsqrt()  # -100 dBFS: digital silence stays silence
        power = power_spectrum(audio, self.window, self.hop, padding="reflect")
        mel = (self.filters @ power + self.floor).log()
        return mel - mel.mean(-1, keepdim=True)
