"""Spectral distances have known values for changes of level; discriminators learn to classify sounds."""

from __future__ import annotations

import math

import pytest
import torch

from snac_core.codec.layers import WNConv1d
from snac_core.discriminators import (
    Discriminators,
    PeriodDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from snac_core.seeding import generator
from snac_runner.pretrain.losses import SpectralDistance, windows


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100, 48000])
def test_every_mel_band_holds_a_bin_at_every_rate(rate: int) -> None:
    distance = SpectralDistance(rate)
    assert 0.008 <= windows(rate)[0] / rate < 0.016
    noise = 0.1 * torch.randn(1, 1, rate // 2)
    assert all(float(value) == 0 for value in distance(noise, noise).values())


def test_twenty_decibels_less_are_one_bel_and_nine_tenths_of_the_magnitude() -> None:
    noise = 0.1 * torch.randn(2, 1, 8000)
    found = SpectralDistance(16000)(0.1 * noise, noise)
    assert float(found["mel_log"]) == pytest.approx(1.0, abs=0.02)
    assert float(found["stft_log"]) == pytest.approx(1.0, abs=0.05)
    assert float(found["mel_linear"]) == pytest.approx(0.9, abs=0.01)
    assert float(found["stft_linear"]) == pytest.approx(0.9, abs=0.01)


def test_silence_has_finite_distances_and_gradients() -> None:
    made = torch.zeros(1, 1, 8000, requires_grad=True)
    loss = sum(SpectralDistance(16000)(made, torch.zeros(1, 1, 8000)).values())
    (gradient,) = torch.autograd.grad(loss, made)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_discriminators_learn_to_tell_a_tone_from_noise_and_their_gradient_reaches_the_audio() -> None:
    discriminators = Discriminators((2, 3), (256,), period_channels=4, spectral_channels=4)
    optimizer = torch.optim.Adam(discriminators.parameters(), lr=3e-3, betas=(0.5, 0.9))
    time = torch.arange(2000) / 8000
    draw = generator("discriminators learn")
    for _ in range(40):
        pitch = 100 + 300 * torch.rand(4, 1, 1, generator=draw)
        tones, noise = 0.1 * torch.sin(2 * math.pi * pitch * time), 0.1 * torch.randn(4, 1, 2000, generator=draw)
        loss = discriminator_loss(discriminators(tones), discriminators(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    noise.requires_grad_()
    real, fake = discriminators(tones), discriminators(noise)
    assert feature_loss(real, fake).item() > feature_loss(fake, fake).item() == 0
    (gradient,) = torch.autograd.grad(adversarial_loss(fake), noise)
    assert gradient.abs().sum() > 0


def test_the_hinge_loss_of_undecided_discriminators_is_two() -> None:
    features = [[torch.zeros(2, 3), torch.zeros(2, 1)]]
    assert float(discriminator_loss(features, features)) == 2
    sure = [[torch.zeros(2, 3), torch.full((2, 1), 1.5)]]
    unsure = [[torch.zeros(2, 3), torch.full((2, 1), -1.5)]]
    assert float(discriminator_loss(sure, unsure)) == 0
    assert float(adversarial_loss(sure)) == -1.5


def test_a_period_discriminators_first_layer_is_a_convolution() -> None:
    layer = PeriodDiscriminator(3, 8, 2).layers[0]
    plain = WNConv1d(1, 8, kernel_size=5, stride=3, padding=2)
    plain.load_state_dict(layer.state_dict())
    for samples in (7, 30, 31, 32):
        audio = torch.randn(2, 1, samples, requires_grad=True)
        of = [torch.autograd.grad(one(audio).square().sum(), [audio, *one.parameters()]) for one in (layer, plain)]
        torch.testing.assert_close(layer(audio), plain(audio))
        torch.testing.assert_close(*of)
