"""`simple`: a small convolutional network with random weights, for experiments and tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from snac_core.seeding import derive
from snac_core.speakers.ecapa import TimeDelay
from snac_core.speakers.encoder import SpeakerEncoder, load_checkpoint, load_strictly
from snac_core.speakers.features import LogMel

SAMPLE_RATE = 16000  # Hz


class Simple(SpeakerEncoder):
    """Three convolutions over log-mel bands, mean and standard deviation over time, a linear layer to 128.

    Untrained unless `weights` are given: embeddings hardly depend on the speaker. The random weights are the same in
    every process.
    """

    name = "simple"
    family = "simple_cnn"
    training_data = "untrained"

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights` (a state dict of the network, as torch or safetensors file), or draw seeded random ones.

        Raises:
            UserError: if the weights do not fit.
        """
        super().__init__()
        self.dim = 128
        self.sample_rate = SAMPLE_RATE
        self.features = LogMel(40, SAMPLE_RATE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("simple speaker encoder"))
            self.network = nn.Sequential(
                TimeDelay(40, 64, kernel=5, stride=2),
                TimeDelay(64, 64, kernel=3, dilation=2),
                TimeDelay(64, 64, kernel=3, dilation=3),
            )
            self.out = nn.Linear(128, self.dim)
        if weights is not None:
            load_strictly(self, load_checkpoint(weights, self.name), weights, self.name)
        else:
            warnings.warn(
                "speaker encoder 'simple' is UNTRAINED: it cannot tell speakers apart, and no result with it as "
                "conditioning encoder or judge means anything; use 'ecapa_tiny' or 'ge2e'",
                UserWarning,
                stacklevel=2,
            )
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 128)."""
        x = self.network(self.features(audio))
        embedding: Tensor = self.out(torch.cat([x.mean(-1), x.var(-1, correction=0).clamp(min=1e-6).sqrt()], dim=1))
        return embedding
