"""Kaldi's log-mel filterbank, batched and differentiable, as ERes2NetV2 was trained on it.

The log-mel features of this project's own encoders."""

from __future__ import annotations

import torch
import torchaudio
from torch import Tensor, nn

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
        filters = mel_triangles(bands, self.fft, sample_rate, low, sample_rate / 2)
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


def mel_triangles(bands: int, fft: int, sample_rate: int, low: float, high: float) -> Tensor:
    """(bands, fft // 2 + 1): triangles of height 1, straight on the scale 1127 ln(1 + f / 700), f in Hz."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127.0 * (1.0 + frequency / 700.0).log()

    edges = torch.linspace(0, 1, bands + 2, dtype=torch.float64)
    first, last = mel(torch.tensor([low, high], dtype=torch.float64))
    left, centre, right = (first + (last - first) * edges).unfold(0, bands, 1)[:, :, None]
    at = mel(torch.arange(fft // 2 + 1, dtype=torch.float64) * sample_rate / fft)
    return torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0).float()


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
        filters = torchaudio.functional.melscale_fbanks(
            window // 2 + 1, 20.0, sample_rate / 2 - 400, bands, sample_rate, norm="slaney", mel_scale="slaney"
        )
        # Unit mean power per band for white noise of unit RMS, so that `floor` has a meaning.
        power = self.window.square().sum()
        self.register_buffer("filters", (filters / filters.sum(0) / power).T.contiguous(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, T) -> (B, bands, T // hop + 1)."""
        level = audio.square().mean(-1, keepdim=True)
        audio = audio * (level + 1e-10).rsqrt()  # -100 dBFS: digital silence stays silence
        size = self.window.numel()
        spectrum = torch.stft(audio, size, self.hop, window=self.window, pad_mode="reflect", return_complex=True)
        mel = (self.filters @ (spectrum.real.square() + spectrum.imag.square()) + self.floor).log()
        return mel - mel.mean(-1, keepdim=True)
