"""Test fixtures for plugins: a small codec, a batch, a conditioning encoder and speakers, all random and seeded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core.codec import SNAC
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import REFERENCE, Conditioning
from snac_core.seeding import derive, generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_core.speakers.sampling import SpeakerSampler, SpeakerTable
from snac_core.step import Step, TrainingContext

ROWS, TARGETS, SPEAKERS = 3, 1, 6
SPEECH_FRAMES = 24  # of speech that strategies attend to
SECONDS = 0.1


def small_codec(**changes: Any) -> SNAC:
    """A codec with random weights that runs in milliseconds; it has the taps of the released models.

    Args:
        changes: constructor arguments of SNAC other than 16 kHz, rates 2,2,2,2 and three codebooks of 32 entries.
    """
    config: dict[str, Any] = {
        "sampling_rate": 16000,
        "encoder_dim": 4,
        "encoder_rates": [2, 2, 2, 2],
        "decoder_dim": 64,
        "decoder_rates": [2, 2, 2, 2],
        "attn_window_size": None,
        "codebook_size": 32,
        "codebook_dim": 4,
        "vq_strides": [4, 2, 1],
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("small codec"))
        return SNAC(**config).eval()


class ToySpeakerEncoder(SpeakerEncoder):
    """A conditioning encoder with random weights: a filterbank, the mean energies of its bands, a linear layer."""

    name = "conformance_encoder"
    family = "random"
    training_data = "none"
    min_seconds = 0.03

    def __init__(self, dim: int, sample_rate: int) -> None:
        super().__init__()
        self.dim, self.sample_rate = dim, sample_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("ear"))
            self.filters = nn.Conv1d(1, 32, 64, stride=32)
            self.out = nn.Linear(32, dim)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) to (B, S)."""
        energies = self.filters(audio.unsqueeze(1)).square().mean(-1)
        embedding: Tensor = self.out(torch.log(energies + 1e-4))
        return embedding


class Fixtures:
    """A batch of three items, one target each, six speakers, and the objects that hooks receive.

    Args:
        codec: frozen in place by the models built on it.
        speaker_dim: S.
    """

    def __init__(self, codec: SNAC, speaker_dim: int) -> None:
        self.codec = codec
        self.speaker_dim = speaker_dim
        samples = max(int(SECONDS * codec.sampling_rate), codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]) + 3
        time = torch.arange(samples) / codec.sampling_rate
        tones = torch.stack([torch.sin(2 * torch.pi * 110 * 2**row * time) for row in range(ROWS)])
        noise = torch.randn(ROWS, samples, generator=generator("surroundings", "noise"))
        self.audio = (0.2 * tones + 0.05 * noise).unsqueeze(1)
        self.speaker_encoder = ToySpeakerEncoder(speaker_dim, codec.sampling_rate)
        voices = torch.randn(SPEAKERS, speaker_dim, generator=generator("surroundings", "voices"))
        other = voices + 0.2 * torch.randn(SPEAKERS, speaker_dim, generator=generator("surroundings", "other audio"))
        names = tuple(f"speaker{row}" for row in range(SPEAKERS))
        self.table = SpeakerTable(
            names, F.normalize(voices, dim=1), F.normalize(other, dim=1), self.speaker_encoder.digest
        )
        self.sampler = SpeakerSampler(self.table, seed=0)

    def conditioning(self, rows: int, first: int = 0) -> Conditioning:
        """Embeddings of `rows` speakers, starting with number `first`."""
        numbers = (torch.arange(rows) + first) % SPEAKERS
        return Conditioning(self.table.conditioning[numbers], {REFERENCE: self.speech(numbers)})

    def speech(self, numbers: Tensor) -> Tensor:
        """What strategies attend to in the voices of speakers: random latents (N, C, R), the same for equal numbers."""
        shape = SPEAKERS, self.codec.latent_dim, SPEECH_FRAMES
        return torch.randn(shape, generator=generator("surroundings", "speech"))[numbers]

    def step(self, model: ConditionedCodec, index: int = 1) -> Step:
        """The argument of `loss`."""
        speakers = torch.arange(ROWS)
        targets = self.sampler.targets(speakers, index, TARGETS)
        return Step(
            model,
            self.audio,
            sample_rate=self.codec.sampling_rate,
            speaker_ids=speakers,
            target_ids=targets,
            speaker_encoder=self.speaker_encoder,
            sampler=self.sampler,
            index=index,
            own_speech=self.speech(speakers),
            target_speech=lambda: self.speech(targets),
        )

    def context(self, model: ConditionedCodec) -> TrainingContext:
        """The argument of `training_start`."""
        return TrainingContext(model, self.sampler, self.table.names, generator("surroundings", "training_start"))


def speech_like(sample_rate: int, seconds: float, rows: int) -> Tensor:
    """Audio (rows, 1, T): harmonics with another F0 and syllable rate in every row, and some noise."""
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    waves = []
    for row in range(rows):
        pitch = 100.0 * 1.3**row
        buzz = torch.stack([torch.sin(2 * torch.pi * pitch * k * time) / k for k in range(1, 12)]).sum(0)
        syllables = 0.6 + 0.4 * torch.sin(2 * torch.pi * (3 + row) * time)
        waves.append(0.1 * buzz * syllables)
    noise = torch.randn(rows, len(time), generator=generator("speech-like", rows))
    return (torch.stack(waves) + 0.003 * noise).unsqueeze(1)
