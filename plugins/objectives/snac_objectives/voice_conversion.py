"""The default objective: reconstruct the source with its own embedding, match the target with another."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from snac_core import Step, Strategy, Taps, hookimpl
from snac_core.legacy import LegacyKeys
from snac_core.losses import MultiScaleSTFT, cosine_distance


class VoiceConversion(Strategy):
    """`recon` and `spk_id` of the output with the source's own embedding, `spk_vc` of the output with the targets'.

    No term compares converted output with the source: the model would learn to ignore the embedding.
    """

    name = "voice_conversion"
    default_weights = {"recon": 1.0, "spk_id": 0.25, "spk_vc": 2.0}  # noqa: RUF012  (a constant of the class)

    legacy_keys = LegacyKeys(
        places={
            "l1_weight": "l1_weight",
            "stft_weight": "stft_weight",
            "n_ffts": "n_ffts",
            "lambda_recon": "weights.recon",
            "lambda_speaker_matching": ("weights.spk_id", "weights.spk_vc"),
            "lambda_speaker_identity": "weights.spk_id",
            "lambda_speaker_vc": "weights.spk_vc",
        }
    )

    class Config(Strategy.Config):
        l1_weight: float = Field(1.0, ge=0, description="Weight of the waveform's mean absolute difference in recon.")
        stft_weight: float = Field(1.0, ge=0, description="Weight of the multi-scale STFT distance in recon.")
        n_ffts: tuple[int, ...] = Field((1024, 2048, 4096), min_length=1, description="STFT windows, in samples.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.stft = MultiScaleSTFT(config.n_ffts)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`recon`, waveform and STFT distance; `spk_id` and `spk_vc`, cosine distances; each a scalar."""
        identity = step.identity.audio
        recon = self.config.l1_weight * F.l1_loss(identity, step.audio)
        recon = recon + self.config.stft_weight * self.stft(identity, step.audio)
        return {
            "recon": recon,
            "spk_id": cosine_distance(step.identity_embedding, step.own_reference).mean(),
            "spk_vc": cosine_distance(step.converted_embedding, step.target_reference).mean(),
        }
