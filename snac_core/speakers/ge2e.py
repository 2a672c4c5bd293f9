"""GE2E: the LSTM speaker encoder of Resemblyzer, with bundled weights (Wan et al. 2018, arXiv 1710.10467)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from snac_core.speakers.encoder import SpeakerEncoder, load_checkpoint, load_strictly, missing_weights
from snac_core.spectral import mel_filterbank, power_spectrum

ASSET = Path(__file__).resolve().parent.parent / "assets" / "ge2e" / "model.safetensors"
HOP = 160  # samples, 10 ms
WINDOW = 400  # samples, 25 ms
PARTIAL = 160  # frames, 1.6 s
PARTIALS_PER_SECOND = 1.3
MIN_COVERAGE = 0.75  # of the last window, else it is dropped


class GE2E(SpeakerEncoder):
    """Mean of the embeddings of overlapping 1.6 s windows, as resemblyzer's `embed_utterance` computes it.

    40 mel bands of the power spectrum (without logarithm), three LSTM layers of 256; the embedding of a window is the
    last state through a linear layer and ReLU, with unit norm. Audio shorter than 1.6 s is padded with zeros.
    """

    name = "ge2e"
    family = "ge2e_lstm"
    training_data = "librispeech-other+voxceleb1+voxceleb2"

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights` (safetensors, or a checkpoint of Resemblyzer), or the bundled file.

        Raises:
            UserError: if the file does not exist or does not fit.
        """
        super().__init__()
        self.dim = 256
        self.sample_rate = 16000
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", mel_filterbank(40, WINDOW, 16000), persistent=False)
        path = Path(weights) if weights is not None else ASSET
        if not path.is_file():
            missing_weights(self.name, path, "reinstall this package", "'ecapa_tiny'")
        state = load_checkpoint(path, self.name)
        state = state.get("model_state", state)  # where a checkpoint has them
        training_only = ("similarity_weight", "similarity_bias")  # scale and bias of the training loss
        load_strictly(self, {key: state[key] for key in state if key not in training_only}, path, self.name)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 256)."""
        starts = partial_starts(audio.shape[-1])
        end = (starts[-1] + PARTIAL) * HOP
        padded = nn.functional.pad(audio, (0, max(0, end - audio.shape[-1])))
        mel = self.filters @ power_spectrum(padded, self.window, HOP, padding="constant")  # (B, 40, F)
        windows = torch.stack([mel[:, :, start : start + PARTIAL] for start in starts], dim=1)  # (B, N, 40, 160)
        last = self._last_state(windows.flatten(0, 1).transpose(1, 2))
        partials = nn.functional.normalize(self.linear(last).relu(), dim=-1)
        return partials.view(-1, len(starts), self.dim).mean(1)

    def _last_state(self, mel: Tensor) -> Tensor:
        """(N, 160, 40) to (N, 256), the last layer's last hidden state."""
        now = torch.backends.cudnn
        kept = {"benchmark": now.benchmark, "deterministic": now.deterministic, "allow_tf32": now.allow_tf32}
        with now.flags(enabled=not mel.requires_grad, **kept):  # cuDNN has no backward in eval mode
            hidden: Tensor = self.lstm(mel)[1][0]
        return hidden[-1]


def partial_starts(samples: int) -> list[int]:
    """First frames of the windows that cover `samples`, after resemblyzer's `compute_partial_slices`."""
    step = round(16000 / PARTIALS_PER_SECOND / HOP)
    frames = math.ceil((samples + 1) / HOP)
    starts = list(range(0, max(1, frames - PARTIAL + step + 1), step))
    coverage = (samples - starts[-1] * HOP) / (PARTIAL * HOP)
    return starts[:-1] if coverage < MIN_COVERAGE and len(starts) > 1 else starts
