"""Small strategies, and a model of them that has learned something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from small_codec import small
from torch import Tensor, nn

from snac_core import SNAC, ConditionedCodec, Conditioning, Step, Strategy, Tap, Taps, hookimpl

SPEAKER_DIM = 6


class Shift(Strategy):
    """x + W s before VQ."""

    name = "shift"

    class Config(Strategy.Config):
        taps: tuple[str, ...] = Field(("latent",), description="Patterns of the taps to edit.")
        strength: float = Field(1.0, gt=0, description="Scales the shift.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.before_taps: Sequence[str] = config.taps
        self.shifts = nn.ModuleDict(
            {tap.name: zeroed(nn.Linear(taps.speaker_dim, tap.channels)) for tap in taps.match(config.taps)}
        )

    @hookimpl
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        return x + self.config.strength * self.shifts[tap.name](cond.speaker).unsqueeze(-1)


class Gain(Strategy):
    """x (1 + W s) at every decoder tap."""

    name = "gain"
    after_taps = ("decoder_*",)

    def __init__(self, config: Strategy.Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.gains = nn.ModuleDict(
            {tap.name: zeroed(nn.Linear(taps.speaker_dim, tap.channels)) for tap in taps.match(self.after_taps)}
        )

    @hookimpl
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        return x * (1 + self.gains[tap.name](cond.speaker).unsqueeze(-1))


class Level(Strategy):
    """An objective with a discriminator and a buffer."""

    name = "level"

    def __init__(self, config: Strategy.Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.discriminator = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"level": step.identity.audio.square().mean()}


def zeroed(layer: nn.Linear) -> nn.Linear:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def learned(*strategies: type[Strategy], codec: SNAC | None = None, **options: Any) -> ConditionedCodec:
    """A model whose parameters have left their initial values."""
    model = ConditionedCodec(codec or small(), strategies, **{"speaker_dim": SPEAKER_DIM, **options})
    with torch.no_grad():
        for parameter in model.strategies.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    return model.eval()


def speakers(rows: int) -> Tensor:
    """Unit vectors (rows, S)."""
    return nn.functional.normalize(torch.randn(rows, SPEAKER_DIM), dim=1)
