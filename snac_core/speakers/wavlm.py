"""`wavlm_sv`: Microsoft's WavLM-base-plus with an x-vector head for speaker verification, through transformers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from snac_core.errors import UserError
from snac_core.speakers.encoder import SpeakerEncoder, missing_weights

HUB = "microsoft/wavlm-base-plus-sv"
INSTEAD = "'ecapa_tiny' or 'ge2e'"


class WavLMSV(SpeakerEncoder):
    """512-d x-vectors of WavLM-base-plus (Chen et al. 2021, arXiv 2110.13900), fine-tuned on VoxCeleb 1."""

    name = "wavlm_sv"
    family = "wavlm_xvector"
    training_data = "librilight+gigaspeech+voxpopuli+voxceleb1"
    min_seconds = 0.4  # the x-vector head's dilated layers span 15 frames of 20 ms

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load a folder saved by transformers (`weights` is its model file), or the released model from the hub.

        Raises:
            UserError: if transformers is not installed, or the model cannot be loaded or downloaded.
        """
        super().__init__()
        try:
            transformers = import_module("transformers")
        except ImportError:
            raise UserError(
                f"speaker encoder {self.name!r} needs the package transformers: install snac-conditioning[hub-judges]; "
                f"without it, use {INSTEAD}"
            ) from None
        source = HUB if weights is None else str(Path(weights).parent)
        try:
            extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(source)
            self.network: Any = transformers.WavLMForXVector.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            remedy = f"download {HUB} from huggingface.co into a folder and give its model file as weights ({reason})"
            missing_weights(self.name, source, remedy, INSTEAD)
        self.dim = int(self.network.config.xvector_output_dim)
        self.sample_rate = int(extractor.sampling_rate)
        self._unit_variance = bool(extractor.do_normalize)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 512)."""
        if self._unit_variance:
            centred = audio - audio.mean(-1, keepdim=True)
            audio = centred * (centred.square().mean(-1, keepdim=True) + 1e-7).rsqrt()
        embedding: Tensor = self.network(audio).embeddings
        return embedding
