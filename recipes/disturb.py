"""What may happen to a voice on its way to an encoder: rooms, narrow bands, noise, other talkers, clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from snac_core.augment import random_equalizer


def disturb(audio: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Disturb each item (B, T) by itself; who speaks stays audible."""
    audio = audio / audio.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-4) * 0.05
    audio = _colour(audio, sample_rate, generator)
    audio = _add_noise(audio, sample_rate, generator)
    audio = _add_talkers(audio, generator)
    return _clip(audio, generator)


def mask_features(features: Tensor, generator: torch.Generator, *, bands: int = 8, frames: int = 20) -> Tensor:
    """SpecAugment (Park et al. 2019): one block of bands and one of frames set to zero, (B, M, F) of zero mean."""
    for axis, most in ((1, bands), (2, frames)):
        size = features.shape[axis]
        width = _uniform(len(features), 0, min(most, size // 4), generator)
        start = _uniform(len(features), 0, 1, generator) * (size - width)
        place = torch.arange(size)
        hidden = (place >= start[:, None]) & (place < (start + width)[:, None])
        features = features.masked_fill(hidden.unsqueeze(3 - axis), 0.0)
    return features


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < share


def _colour(audio: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Reverberation, equaliser and band limits, in one multiplication of spectra."""
    count, samples = audio.shape
    tail = int(0.4 * sample_rate)
    size = samples + tail
    spectrum = torch.fft.rfft(audio, size)
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[1])
    spectrum = spectrum * _equaliser(count, frequency, generator) * _band(count, frequency, generator)
    wet = _chosen(count, 0.35, generator)
    if wet.any():
        spectrum[wet] = spectrum[wet] * torch.fft.rfft(_rooms(int(wet.sum()), tail, sample_rate, generator), size)
    coloured: Tensor = torch.fft.irfft(spectrum, size)
    return coloured[:, :samples]


def _rooms(count: int, samples: int, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Room responses: the direct sound, then noise that decays by 60 dB in 0.1 to 0.7 s, 0 to 15 dB under it."""
    time = torch.arange(samples) / sample_rate
    decay = _uniform(count, 0.1, 0.7, generator)[:, None]
    room = torch.randn(count, samples, generator=generator) * 10 ** (-3 * time / decay)
    room[:, : int(0.002 * sample_rate)] = 0
    ratio = 10 ** (-_uniform(count, 0, 15, generator) / 20)
    room = room / room.square().sum(-1, keepdim=True).sqrt() * ratio[:, None]
    room[:, 0] = 1
    return room


def _equaliser(count: int, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """A parametric equaliser of up to 12 dB either way in eight bands, on half of the items."""
    chosen = _chosen(count, 0.5, generator)[:, None]
    return torch.where(chosen, random_equalizer(count, frequency, 12.0, generator), 1.0)


def _band(count: int, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """Fourth-order low pass (2.5 to 7.5 kHz) on a third of the items, high pass (60 to 400 Hz) on a fifth."""
    low = torch.where(_chosen(count, 0.33, generator), _uniform(count, 2500, 7500, generator), torch.inf)
    high = torch.where(_chosen(count, 0.2, generator), _uniform(count, 60, 400, generator), 0.0)
    low_pass = (1 + (frequency / low[:, None]) ** 8).rsqrt()
    high_pass = (1 + (high[:, None] / frequency.clamp(min=1.0)) ** 8).rsqrt()
    return low_pass * high_pass


def _add_noise(audio: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Noise of random colour (power falling by 0 to 6 dB an octave) at 3 to 35 dB, on six items in ten."""
    count, samples = audio.shape
    spectrum = torch.fft.rfft(torch.randn(count, samples, generator=generator))
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[1]).clamp(min=50)
    slope = _uniform(count, 0, 1, generator)[:, None]
    noise = torch.fft.irfft(spectrum * frequency**-slope, samples)
    level = 10 ** (-_uniform(count, 3, 35, generator) / 20) * _chosen(count, 0.6, generator)
    return audio + _matched(noise, audio) * level[:, None]


def _add_talkers(audio: Tensor, generator: torch.Generator) -> Tensor:
    """Three other items of the batch at 8 to 25 dB under the item, on three items in twenty."""
    order = torch.randperm(len(audio), generator=generator)
    babble = sum((audio[order].roll((shift, 997 * shift), (0, 1)) for shift in (1, 2, 3)), torch.zeros_like(audio))
    level = 10 ** (-_uniform(len(audio), 8, 25, generator) / 20) * _chosen(len(audio), 0.15, generator)
    return audio + _matched(babble, audio) * level[:, None]


def _clip(audio: Tensor, generator: torch.Generator) -> Tensor:
    """Peaks cut at a third to all of their height, on one item in ten."""
    peak = audio.abs().amax(-1)
    limit = torch.where(_chosen(len(audio), 0.1, generator), _uniform(len(audio), 0.3, 1, generator), 1.0) * peak
    return audio.clamp(-limit[:, None], limit[:, None])


def _matched(noise: Tensor, audio: Tensor) -> Tensor:
    """`noise` at the RMS of `audio`, item by item."""
    power, wanted = (t.square().mean(-1, keepdim=True) for t in (noise, audio))
    return noise * (wanted / power.clamp(min=1e-12)).sqrt()
