"""Augmentation changes speed and level by the amounts that its settings allow."""

from __future__ import annotations

import math

import torch

from snac_core.seeding import generator
from snac_runner.pretrain.data import augment
from snac_runner.pretrain.settings import Augmentation


def test_speech_played_faster_is_higher_by_the_same_factor() -> None:
    rate, samples = 8000, 4000
    tone = torch.sin(2 * math.pi * 200 * torch.arange(6000) / rate).view(1, 1, -1)
    seen = set()
    for seed in range(12):
        made = augment(tone, samples, rate, Augmentation(gain_db=0, speed=0.2, formant=0, changed=1.0), generator(seed))
        assert made.shape == (1, 1, samples)
        peak = int(torch.fft.rfft(made[0, 0] * torch.hann_window(samples)).abs().argmax()) * rate / samples
        assert 200 / 1.21 < peak < 200 * 1.21
        seen.add(round(peak / 10))
    assert len(seen) > 3


def test_a_change_of_level_stays_within_its_bounds_and_never_clips() -> None:
    loud = 0.9 * torch.sin(torch.arange(2000) / 3).view(1, 1, -1).repeat(16, 1, 1)
    made = augment(loud, 2000, 8000, Augmentation(gain_db=12, changed=0), generator("gain"))
    peaks = made.abs().amax(dim=(1, 2))
    assert float(peaks.max()) <= 1.0
    assert float(peaks.min()) >= 0.9 * 10 ** (-12 / 20) - 1e-3
    assert float(peaks.max() / peaks.min()) > 1.5
