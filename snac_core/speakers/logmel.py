"""The log-mel features of this project's own encoders."""

from __future__ import annotations

import torch
import torchaudio
from torch import Tensor, nn


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
