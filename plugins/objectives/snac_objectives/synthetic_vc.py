"""Supervised conversion: from a synthetically changed voice back to the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from snac_core import Step, Strategy, Taps, hookimpl
from snac_core.augment import change_voice, random_equalization
from snac_core.legacy import LegacyKeys
from snac_core.losses import MultiScaleSTFT, cosine_distance
from snac_core.seeding import generator


def _from_original(values: Mapping[str, Any], is_adapter: bool) -> dict[str, Any]:
    """An original file changes no spectral balance, and formants only if it says so."""
    return {"equaliser_db": 0.0, **({} if values.get("use_formant_shift", True) else {"formants": []})}


class SyntheticVC(Strategy):
    """Convert the source with shifted pitch, formants and spectral balance back to the source, with its embedding.

    The true result of this conversion is known sample by sample.
    """

    name = "synthetic_vc"
    default_weights = {"recon": 0.3, "spk_synth": 0.3}  # noqa: RUF012  (a constant of the class)

    legacy_keys = LegacyKeys(
        places={
            "l1_weight": "l1_weight",
            "stft_weight": "stft_weight",
            "n_ffts": "n_ffts",
            "synthetic_vc_probability": "probability",
            "pitch_shift_range": "semitones",
            "formant_shift_range": "formants",
            "lambda_synthetic": ("weights.recon", "weights.spk_synth"),
        },
        switch="use_synthetic_vc",
        computed_from=("use_formant_shift",),
        compute=_from_original,
    )

    class Config(Strategy.Config):
        probability: float = Field(
            0.5, gt=0, le=1, description="Fraction of the batch that is used; at least one item."
        )
        semitones: tuple[float, ...] = Field(
            (-2, -1, 1, 2), description="Pitch shifts to choose from, in semitones; empty: none."
        )
        formants: tuple[Annotated[float, Field(gt=-0.5, lt=0.5)], ...] = Field(
            (-0.2, -0.1, 0.1, 0.2), description="Relative formant shifts to choose from; empty: none."
        )
        equaliser_db: float = Field(
            6.0, ge=0, description="Largest gain of a random parametric equalizer, in dB; 0: none."
        )
        l1_weight: float = Field(1.0, ge=0, description="Weight of the waveform's mean absolute difference in recon.")
        stft_weight: float = Field(1.0, ge=0, description="Weight of the multi-scale STFT distance in recon.")
        n_ffts: tuple[int, ...] = Field((1024, 2048, 4096), min_length=1, description="STFT windows, in samples.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.stft = MultiScaleSTFT(config.n_ffts)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`recon`, distance to the source, and `spk_synth`, cosine distance to its speaker; each a scalar."""
        draw = generator(step.sampler.seed, step.index, "synthetic voices")
        size = len(step.batch_speaker_ids)
        count = max(1, round(self.config.probability * size))
        chosen = torch.randperm(size, generator=draw)[:count]  # items of the batch
        here = torch.isin(chosen, step.rows)  # (count,), those that are in this part of the batch
        rows = torch.searchsorted(step.rows, chosen[here]).to(step.audio.device)
        if not len(rows):
            return {"recon": step.audio.new_zeros(()), "spk_synth": step.audio.new_zeros(())}
        original = step.audio[rows]
        own = step.own[rows]
        made = step.model.reconstruct(self.another_voice(original, step.sample_rate, draw, here), own).audio
        recon = self.config.l1_weight * F.l1_loss(made, original)
        recon = recon + self.config.stft_weight * self.stft(made, original)
        distance = cosine_distance(step.speaker_encoder(made, step.sample_rate), step.own_reference[rows]).mean()
        share = (len(rows) / len(step.audio)) / (count / size)  # 1 if this part has as many of the chosen as others
        return {"recon": share * recon, "spk_synth": share * distance}

    def another_voice(self, audio: Tensor, sample_rate: int, draw: torch.Generator, here: Tensor) -> Tensor:
        """(B, 1, T) with random changes per item, drawn from the settings for (count,) items; B of them are `here`."""
        config, count = self.config, len(here)
        semitones, formants = (_drawn(choices, count, draw)[here] for choices in (config.semitones, config.formants))
        if config.semitones or config.formants:
            audio = change_voice(audio, sample_rate, semitones, 1 + formants)
        if not config.equaliser_db:
            return audio
        return random_equalization(audio, sample_rate, config.equaliser_db, draw, count=count, rows=here)


def _drawn(choices: tuple[float, ...], count: int, draw: torch.Generator) -> Tensor:
    """`count` uniform draws (count,) from the choices; zeros if there are none."""
    if not choices:
        return torch.zeros(count)
    return torch.tensor(choices)[torch.randint(len(choices), (count,), generator=draw)]
