"""Perturb speech for the training of encoders and recognisers: rooms, band limits, noise, other talkers, clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from snac_core.augment import random_equalizer


def perturb(audio: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Perturb each item of (B, T) independently; neither the speaker nor the words change.

    Args:
        audio: (B, T).
        sample_rate: in Hz.
        generator: of all random amounts.

    Returns:
        (B, T); the RMS level before clipping is about 0.05.
    """
    audio = audio / audio.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-4) * 0.05
    audio = _filter(audio, sample_rate, generator)
    audio = _add_noise(audio, sample_rate, generator)
    audio = _add_talkers(audio, generator)
    return _clip(audio, generator)


def mask_features(features: Tensor, generator: torch.Generator, *, bands: int = 8, frames: int = 20) -> Tensor:
    """SpecAugment (Park et al. 2019) without time warping: one mask over bands and one over frames.

    Args:
        features: (B, M, F) with zero mean.
        generator: of widths and positions.
        bands, frames: largest width of a mask; at most a quarter of the axis.
    """
    for axis, largest in ((1, bands), (2, frames)):
        size = features.shape[axis]
        width = _uniform(len(features), 0, min(largest, size // 4), generator)
        start = _uniform(len(features), 0, 1, generator) * (size - width)
        position = torch.arange(size)
        masked = (position >= start[:, None]) & (position < (start + width)[:, None])
        features = features.masked_fill(masked.unsqueeze(3 - axis), 0.0)
    return features


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    """(B,) True with probability `share`."""
    return torch.rand(count, generator=generator) < share


def _filter(audio: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Equalizer, band limits and reverberation (35 % of the items), as one multiplication of spectra."""
    count, samples = audio.shape
    tail = int(0.4 * sample_rate)
    size = samples + tail
    spectrum = torch.fft.rfft(audio, size)
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[1])
    spectrum = spectrum * _equalizer(count, frequency, generator) * _band_limits(count, frequency, generator)
    wet = _chosen(count, 0.35, generator)
    if wet.any():
        rooms = _room_responses(int(wet.sum()), tail, sample_rate, generator)
        spectrum[wet] = spectrum[wet] * torch.fft.rfft(rooms, size)
    filtered: Tensor = torch.fft.irfft(spectrum, size)
    return filtered[:, :samples]


def _room_responses(count: int, samples: int, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Direct sound, then noise that decays by 60 dB in 0.1 to 0.7 s, with 0 to 15 dB less energy: (B, samples)."""
    time = torch.arange(samples) / sample_rate
    decay = _uniform(count, 0.1, 0.7, generator)[:, None]
    response = torch.randn(count, samples, generator=generator) * 10 ** (-3 * time / decay)
    response[:, : int(0.002 * sample_rate)] = 0
    ratio = 10 ** (-_uniform(count, 0, 15, generator) / 20)
    response = response / response.square().sum(-1, keepdim=True).sqrt() * ratio[:, None]
    response[:, 0] = 1
    return response


def _equalizer(count: int, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """Gains of up to 12 dB up or down in eight bands, for half of the items."""
    chosen = _chosen(count, 0.5, generator)[:, None]
    return torch.where(chosen, random_equalizer(count, frequency, 12.0, generator), 1.0)


def _band_limits(count: int, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """Fourth-order low pass (2.5 to 7.5 kHz) for 33 % of the items, high pass (60 to 400 Hz) for 20 %."""
    low = torch.where(_chosen(count, 0.33, generator), _uniform(count, 2500, 7500, generator), torch.inf)
    high = torch.where(_chosen(count, 0.2, generator), _uniform(count, 60, 400, generator), 0.0)
    low_pass = (1 + (frequency / low[:, None]) ** 8).rsqrt()
    high_pass = (1 + (high[:, None] / frequency.clamp(min=1.0)) ** 8).rsqrt()
    return low_pass * high_pass


def _add_noise(audio: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
    """Noise at an SNR of 3 to 35 dB, its power falling by 0 to 6 dB per octave, for 60 % of the items."""
    count, samples = audio.shape
    spectrum = torch.fft.rfft(torch.randn(count, samples, generator=generator))
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[1]).clamp(min=50)
    slope = _uniform(count, 0, 1, generator)[:, None]
    noise = torch.fft.irfft(spectrum * frequency**-slope, samples)
    gain = 10 ** (-_uniform(count, 3, 35, generator) / 20) * _chosen(count, 0.6, generator)
    return audio + _with_level_of(audio, noise) * gain[:, None]


def _add_talkers(audio: Tensor, generator: torch.Generator) -> Tensor:
    """Three other items of the batch at an SNR of 8 to 25 dB, for 15 % of the items."""
    order = torch.randperm(len(audio), generator=generator)
    babble = sum((audio[order].roll((shift, 997 * shift), (0, 1)) for shift in (1, 2, 3)), torch.zeros_like(audio))
    gain = 10 ** (-_uniform(len(audio), 8, 25, generator) / 20) * _chosen(len(audio), 0.15, generator)
    return audio + _with_level_of(audio, babble) * gain[:, None]


def _clip(audio: Tensor, generator: torch.Generator) -> Tensor:
    """Clipping at 30 to 100 % of the peak, for 10 % of the items."""
    peak = audio.abs().amax(-1)
    limit = torch.where(_chosen(len(audio), 0.1, generator), _uniform(len(audio), 0.3, 1, generator), 1.0) * peak
    return audio.clamp(-limit[:, None], limit[:, None])


def _with_level_of(audio: Tensor, noise: Tensor) -> Tensor:
    """`noise` scaled to the RMS level of `audio`, per item."""
    power, wanted = (t.square().mean(-1, keepdim=True) for t in (noise, audio))
    return noise * (wanted / power.clamp(min=1e-12)).sqrt()
