"""Audio that sounds nearly the same to the ear: what a score loses on it was an inaudible attack on the judge."""

from __future__ import annotations

import torch
from torch import Tensor

from snac_core.seeding import generator


def roughened(audio: Tensor, sample_rate: int) -> Tensor:
    """Audio (T,) after a 7 kHz low-pass, with white noise at 30 dB: to the ear nearly the same."""
    spectrum = torch.fft.rfft(audio.double())
    spectrum[torch.fft.rfftfreq(len(audio), 1 / sample_rate) > 7000] = 0
    filtered = torch.fft.irfft(spectrum, n=len(audio))
    noise = torch.randn(len(audio), generator=generator("roughened"), dtype=torch.float64)
    rough: Tensor = filtered + noise * filtered.square().mean().sqrt() * 10 ** (-30 / 20)
    return rough.to(audio.dtype)
