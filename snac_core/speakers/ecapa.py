"""`ecapa`: SpeechBrain's released ECAPA-TDNN with its whole pipeline, computed here from its weights alone.

Features and settings are those of speechbrain/spkrec-ecapa-voxceleb. The package is not needed: its loader would run
code named in a configuration file.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from snac_core.speakers.ecapa_tdnn import ECAPATDNN
from snac_core.speakers.encoder import SpeakerEncoder, load_checkpoint, load_strictly, missing_weights

HUB = "speechbrain/spkrec-ecapa-voxceleb"
FILE = "embedding_model.ckpt"


class SpeechBrainFbank(nn.Module):
    """80 band levels in dB, at most 80 dB under the loudest, less each band's mean: (B, T) -> (B, 80, T // 160 + 1)."""

    def __init__(self, bands: int = 80, sample_rate: int = 16000) -> None:
        super().__init__()
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hamming_window(400), persistent=False)
        top = 2595 * math.log10(1 + sample_rate / 2 / 700)
        edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
        centre, width = edges[1:-1, None], (edges[1:] - edges[:-1])[:-1, None]
        slope = (torch.linspace(0, sample_rate // 2, 201) - centre) / width
        self.register_buffer("filters", (1 - slope.abs()).clamp(min=0), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        spectrum = torch.stft(audio, 400, 160, window=self.window, pad_mode="constant", return_complex=True)
        power = self.filters @ (spectrum.real.square() + spectrum.imag.square())
        level = 10 * power.clamp(min=1e-10).log10()
        level = torch.maximum(level, level.amax(dim=(1, 2), keepdim=True) - 80)
        return level - level.mean(-1, keepdim=True)


class Ecapa(SpeakerEncoder):
    """SpeechBrain's ECAPA-TDNN of VoxCeleb 1 and 2, 192-d."""

    name = "ecapa"
    family = "ecapa_tdnn"
    training_data = "voxceleb1+voxceleb2"

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights` (the released embedding_model.ckpt), or fetch them from the hub or its local cache.

        Raises:
            UserError: if they are not there and cannot be fetched, or do not fit.
        """
        super().__init__()
        self.dim = 192
        self.sample_rate = 16000
        self.features = SpeechBrainFbank()
        self.network = ECAPATDNN()
        path = Path(weights) if weights is not None else _fetched()
        load_strictly(self.network, load_checkpoint(path, self.name), path, self.name)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz -> (B, 192)."""
        embedding: Tensor = self.network(self.features(audio))
        return embedding


def _fetched() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(HUB, FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        remedy = f"they could not be fetched; download {FILE} of {HUB} from huggingface.co and give its path as weights"
        missing_weights("ecapa", f"huggingface.co/{HUB}", remedy, "'ecapa_tiny' or 'ge2e'")
