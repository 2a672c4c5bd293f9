"""What is said must survive the conversion: there and back again, and as the target says it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from snac_core import Step, Strategy, Taps, hookimpl
from snac_core.conditioning import Conditioning
from snac_core.losses import MultiScaleSTFT


class Content(Strategy):
    """`cycle`: converted output, converted back to the source's speaker, sounds like the source.

    Cycle consistency of voice conversion is that of CycleGAN-VC (Kaneko and Kameoka 2018, eq. 3), here with one model
    both ways and the source speaker's embedding on the way back.
    """

    name = "content"
    default_weights = {"cycle": 1.0}  # noqa: RUF012  (a constant of the class)

    class Config(Strategy.Config):
        n_ffts: tuple[int, ...] = Field((1024, 2048, 4096), min_length=1, description="STFT windows, in samples.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.stft = MultiScaleSTFT(config.n_ffts)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`cycle`: the multi-scale STFT distance between the source and what came back, a scalar."""
        there = step.converted.audio
        copies = len(there) // len(step.audio)
        back = step.model.reconstruct(there, Conditioning.cat([step.own] * copies)).audio
        return {"cycle": self.stft(back, step.audio.repeat(copies, 1, 1))}
