"""`ecapa_tiny`: the small ECAPA-TDNN of this project, whose weights come with it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from snac_core.speakers.ecapa_tdnn import ECAPATDNN
from snac_core.speakers.encoder import SpeakerEncoder, load_checkpoint, load_strictly, missing_weights
from snac_core.speakers.logmel import LogMel

ASSET = Path(__file__).resolve().parent.parent / "assets" / "ecapa_tiny" / "model.safetensors"
SAMPLE_RATE = 16000  # Hz


class SpeakerNetwork(nn.Module):
    """What is trained: features and ECAPA-TDNN, audio (B, T) at 16 kHz -> (B, 192) of any norm."""

    dim = 192

    def __init__(self) -> None:
        super().__init__()
        self.features = LogMel(64, SAMPLE_RATE)
        self.net = ECAPATDNN(
            bands=64, channels=256, pooled=512, scale=4, squeeze=64, attention=128, dim=self.dim, stride=2
        )

    def embed_features(self, features: Tensor) -> Tensor:
        """(B, 64, F) -> (B, 192)."""
        embedding: Tensor = self.net(features)
        return embedding

    def forward(self, audio: Tensor) -> Tensor:
        return self.embed_features(self.features(audio))


class EcapaTiny(SpeakerEncoder):
    """Small ECAPA-TDNN (1.5 M parameters), trained with an additive angular margin; its model card has its limits."""

    name = "ecapa_tiny"
    family = "ecapa_tdnn"
    training_data = "librispeech_mini-train+espeak-ng"

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights` (safetensors of a `SpeakerNetwork`), or the file that comes with the package.

        Raises:
            UserError: if there is no such file, or it does not fit.
        """
        super().__init__()
        self.dim = SpeakerNetwork.dim
        self.sample_rate = SAMPLE_RATE
        self.network = SpeakerNetwork()
        path = Path(weights) if weights is not None else ASSET
        if not path.is_file():
            remedy = "reinstall this package, or train them with `python -m runner.encoders train`"
            missing_weights(self.name, path, remedy, "'ge2e'")
        load_strictly(self.network, load_checkpoint(path, self.name), path, self.name)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz -> (B, 192)."""
        embedding: Tensor = self.network(audio)
        return embedding
