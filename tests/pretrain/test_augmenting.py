"""Augmentation moves what it says by as much as it says, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from runner.pretrain.augmenting import augment, move_formants
from runner.pretrain.settings import Augmentation
from snac_core.seeding import generator


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


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_formants_move_by_the_factor_and_the_harmonics_stay(factor: float) -> None:
    rate, pitch, formant = 16000, 125.0, 1500.0
    time = torch.arange(rate) / rate
    harmonics = torch.arange(1, 60)[:, None] * pitch
    heights = torch.exp(-(((harmonics - formant) / 500) ** 2)) + 0.05
    voice = 0.02 * (heights * torch.sin(2 * math.pi * harmonics * time)).sum(0, keepdim=True)
    moved = move_formants(voice, rate, factor)
    assert moved.shape == voice.shape

    spectrum = torch.fft.rfft(moved[0, 2000:-2000] * torch.hann_window(rate - 4000)).abs()
    hz = torch.arange(len(spectrum)) * rate / (rate - 4000)
    band = (hz > 700) & (hz < 2500)
    power = spectrum[band].square()
    assert float((hz[band] * power).sum() / power.sum()) == pytest.approx(formant * factor, rel=0.04)
    off_pitch = (hz[band] / pitch - (hz[band] / pitch).round()).abs() > 0.2
    assert spectrum[band][off_pitch].max() < 0.05 * spectrum[band].max()


def test_formants_that_do_not_move_leave_the_speech_as_it_was() -> None:
    noise = 0.1 * torch.randn(1, 8000)
    torch.testing.assert_close(move_formants(noise, 16000, 1.0), noise, atol=1e-5, rtol=0)
