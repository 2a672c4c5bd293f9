"""Content losses: cycle consistency, and a distance to the target speaker's recording of the same words."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from snac_core import Step, Strategy, Taps, UserError, hookimpl
from snac_core.conditioning import Conditioning
from snac_core.losses import MultiScaleSTFT, aligned_distance
from snac_objectives.requirements import parallel_speech


class Content(Strategy):
    """`cycle`: the distance between the source and the converted output converted back to the source's speaker.

    `parallel`: the distance between the converted output and the target's own recording of the same words, aligned in
    time; zero for a target without such a recording. Only for data with such recordings: synthetic speakers, VCTK's
    common sentences.

    The cycle consistency is that of CycleGAN-VC (Kaneko and Kameoka 2018, eq. 3), with one model for both directions.
    """

    name = "content"
    default_weights = {"cycle": 1.0}  # noqa: RUF012  (a constant of the class)

    class Config(Strategy.Config):
        cycle: bool = Field(True, description="Convert the output back and compare it with the source.")
        parallel: bool = Field(False, description="Compare with the target's recording of the same words.")
        n_ffts: tuple[int, ...] = Field((1024, 2048, 4096), min_length=1, description="STFT windows, in samples.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        if not (config.cycle or config.parallel):
            raise UserError(f"{self.name!r} has neither cycle nor parallel; set one of them to true")
        self.stft = MultiScaleSTFT(config.n_ffts)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`cycle`, multi-scale STFT distance of the back-converted audio; `parallel`, in bels; each a scalar."""
        terms = {}
        if self.config.cycle:
            there = step.converted.audio
            copies = len(there) // len(step.audio)
            back = step.model.reconstruct(there, Conditioning.cat([step.own] * copies)).audio
            terms["cycle"] = self.stft(back, step.audio.repeat(copies, 1, 1))
        if self.config.parallel:
            recorded, lengths = parallel_speech(self, step)
            distance = aligned_distance(step.converted.audio, recorded, lengths, step.sample_rate)
            terms["parallel"] = distance.mean()
        return terms
