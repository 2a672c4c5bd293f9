"""Gates on every decoder stage, computed from the speaker embedding."""

import torch
from pydantic import Field
from torch import nn

from snac_core import Strategy, hookimpl


class SpeakerGate(Strategy):
    """Scales every channel of each decoder stage by 1 + strength * tanh(W s); exactly 1 at initialisation."""

    name = "speaker_gate"
    after_taps = ("decoder_*",)

    class Config(Strategy.Config):
        strength: float = Field(1.0, gt=0, description="Largest deviation of a gate from 1.")

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.gates = nn.ModuleDict(
            {tap.name: nn.Linear(taps.speaker_dim, tap.channels) for tap in taps.match(self.after_taps)}
        )
        for gate in self.gates.values():
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    @hookimpl
    def after_vq(self, x, cond, tap):
        gate = torch.tanh(self.gates[tap.name](cond.speaker))
        return x * (1 + self.config.strength * gate).unsqueeze(-1)


@hookimpl
def register_strategies(register):
    register(SpeakerGate)
