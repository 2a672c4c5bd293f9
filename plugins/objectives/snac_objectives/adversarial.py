"""Adversarial training of the identity and converted outputs against waveform discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from snac_core import Step, Strategy, Taps, hookimpl
from snac_core.discriminators import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    without_parameter_gradients,
)
from snac_core.legacy import LegacyKeys, number


def _from_original(values: Mapping[str, Any], is_adapter: bool) -> dict[str, Any]:
    """`gan_weight` of an original file multiplies both terms."""
    weight = number(values, "gan_weight", 1)
    return {
        "weights.adv": weight * number(values, "lambda_adv", 1),
        "weights.features": weight * number(values, "lambda_fm", 2),
        "arm.betas": [0.5, 0.9],
    }


class Adversarial(Strategy):
    """Multi-period and multi-resolution STFT discriminators with hinge and feature matching losses.

    Periods as in HiFi-GAN (Kong et al. 2020), spectrograms as in EnCodec (Defossez et al. 2022). The width of the
    discriminators follows the codec's decoder: 41 M and 0.3 M parameters for snac_24khz. They belong to the arm, have
    their own optimizer, and are not saved with the model.
    """

    name = "adversarial"
    default_weights = {"adv": 1.0, "features": 2.0}  # noqa: RUF012  (a constant of the class)

    legacy_keys = LegacyKeys(
        places={
            "mpd_periods": "periods",
            "mrd_fft_sizes": "n_ffts",
            "disc_learning_rate": "arm.discriminator_lr",
            "grad_clip_disc": "arm.discriminator_grad_clip",
        },
        switch="gan_weight",
        computed_from=("lambda_adv", "lambda_fm"),
        compute=_from_original,
    )

    class Config(Strategy.Config):
        periods: tuple[int, ...] = Field(
            (2, 3, 5, 7, 11), min_length=1, description="Periods of the period discriminators, in samples."
        )
        n_ffts: tuple[int, ...] = Field(
            (1024, 2048, 4096),
            min_length=1,
            description="Windows of the spectrogram discriminators, in samples; the hop is a quarter.",
        )
        channels: int = Field(
            0,
            ge=0,
            description="Channels of the discriminators' first layers; 0: 1/32 of the decoder's channels, at least 4.",
        )
        warmup_steps: int = Field(
            100,
            ge=0,
            description="Steps of linear warmup of the gradient, while the discriminators are trained.",
        )

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        channels = config.channels or max(4, taps.match(("decoder_0",))[0].channels // 32)
        self.discriminator = Discriminators(
            config.periods, config.n_ffts, period_channels=channels, spectral_channels=channels, period_growth=4
        )

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`adv`, hinge loss of all outputs, and `features`, feature matching of source and identity output; scalars."""
        outputs = torch.cat([step.identity.audio, step.converted.audio])
        with without_parameter_gradients(self.discriminator):
            made = self.discriminator(outputs)
            with torch.no_grad():
                real = self.discriminator(step.audio)
        identity = [[layer[: _rows(layer, outputs, step.audio)] for layer in discriminator] for discriminator in made]
        share = min(1.0, step.index / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        terms = {"adv": adversarial_loss(made), "features": feature_loss(real, identity, items=len(step.audio))}
        return {name: _scale_gradient(term, share) for name, term in terms.items()}

    @hookimpl
    def discriminator_loss(self, step: Step) -> dict[str, Tensor]:
        """`discriminator`: hinge loss of the source and all outputs, detached; a scalar."""
        outputs = torch.cat([step.identity.audio, step.converted.audio]).detach()
        return {"discriminator": discriminator_loss(self.discriminator(step.audio), self.discriminator(outputs))}


def _rows(layer: Tensor, outputs: Tensor, audio: Tensor) -> int:
    """Number of rows of a layer for the first `len(audio)` outputs; period discriminators have several per item."""
    return len(layer) // len(outputs) * len(audio)


def _scale_gradient(term: Tensor, share: float) -> Tensor:
    """The same value with its gradient scaled by `share`, so that the logged value does not change."""
    return share * term + (1 - share) * term.detach()
