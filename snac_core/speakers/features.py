"""Log-mel features of speaker encoders: Kaldi's filterbank for ERes2NetV2, and those of `ecapa_tiny`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snac_core.spectral import kaldi_filterbank, mel_filterbank, power_spectrum

_EPSILON = torch.finfo(torch.float32).eps


class KaldiFbank(nn.Module):
    """Kaldi's log-mel filterbank energies, batched and differentiable, without dither, for audio of full scale 1.

    Frames of 25 ms every 10 ms, without padding at the ends. The mean of each frame is removed; then come pre-emphasis
    (0.97), the "povey" window (Hann to the power 0.85), and zero padding to 512 samples. After
    kaldi/src/feat/feature-window.cc and mel-computations.cc. `torchaudio.compliance.kaldi.fbank` takes one waveform
    per call, so ours is used for batches.

    Args:
        bands: number of mel bands.
        sample_rate: in Hz.
        low: lower edge of the lowest band, in Hz.
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
        """(B, T) to (B, bands, F), with F = 1 + (T - 400) // 160 at 16 kHz."""
        frames = audio.unfold(-1, self.size, self.hop)  # (B, F, 400)
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(frames * self.window, self.fft)
        power = spectrum.real.square() + spectrum.imag.square()
        energies: Tensor = (power @ self.filters.T).clamp(min=_EPSILON).log()
        return energies.transpose(1, 2)


class LogMel(nn.Module):
    """Log-mel bands, invariant to the level and the long-term spectrum of the audio.

    The audio is scaled to unit RMS, and the mean of each band over time is subtracted from the log energies.

    Args:
        bands: number of mel bands.
        sample_rate: in Hz.
        window: length of the Hann window in samples.
        hop: in samples.
        floor: added to the band powers before the log, about 50 dB below those of speech; it bounds the gradient.
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
        """(B, T) to (B, bands, T // hop + 1), in nats."""
        level = audio.square().mean(-1, keepdim=True)
        audio = audio * (level + 1e-10).rsqrt()  # -100 dBFS: digital silence stays silence
        power = power_spectrum(audio, self.window, self.hop, padding="reflect")
        mel = (self.filters @ power + self.floor).log()
        return mel - mel.mean(-1, keepdim=True)
