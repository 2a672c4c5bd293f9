"""Training batches for a base codec: random crops of several corpora in fixed shares, augmented."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snac_core.augment import resample_by, shift_formants
from snac_core.seeding import derive, generator
from snac_runner.data.corpus import Corpus
from snac_runner.data.crops import CropLoader
from snac_runner.pretrain.settings import Augmentation


def augment(audio: Tensor, samples: int, sample_rate: int, how: Augmentation, draw: torch.Generator) -> Tensor:
    """Change level, speed and formants of each item by random amounts.

    Args:
        audio: (B, 1, T') with T' at least `samples * (1 + speed)`.
        samples: T of the result (B, 1, T).
        sample_rate: in Hz.
        how: largest changes.
        draw: generator of the amounts; four numbers per item are drawn.
    """
    gain, chance, speed, formant = torch.rand(len(audio), 4, generator=draw).T
    changed = chance < how.changed
    augmented: Tensor = audio[..., :samples].clone()
    if changed.any():
        moved = resample_by(audio[changed], 1 + (2 * speed[changed] - 1) * how.speed, samples)
        if how.formant:
            moved = shift_formants(moved, sample_rate, 1 + (2 * formant[changed] - 1) * how.formant)
        augmented[changed] = moved
    augmented *= (10 ** ((2 * gain - 1) * how.gain_db / 20)).view(-1, 1, 1)
    return augmented / augmented.abs().amax(dim=-1, keepdim=True).clamp(min=1)


class SpeechMix:
    """Batches of crops from the train splits of several corpora. A batch depends on (seed, step) only.

    Args:
        corpora: each with its share of every batch.
        sample_rate: in Hz.
        crop_samples: T, length of a crop in samples.
        batch_size: B.
        augmentation: random changes of the crops.
        seed: of crops and augmentation.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Corpus, float]],
        sample_rate: int,
        crop_samples: int,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.sample_rate = sample_rate
        self.crop_samples = crop_samples
        self.augmentation = augmentation
        self.seed = seed
        longest = crop_samples * (1 + augmentation.speed) / sample_rate
        self.loaders = [
            CropLoader(corpus, "train", sample_rate, longest, count, derive(seed, corpus.name))
            for (corpus, _), count in zip(corpora, _counts([s for _, s in corpora], batch_size), strict=True)
            if count
        ]
        self.steps_per_epoch = max(loader.steps_per_epoch for loader in self.loaders)

    def at(self, step: int) -> Tensor:
        """The batch of a step, (B, 1, T)."""
        audio = torch.cat([loader.at(step).audio for loader in self.loaders])
        draw = generator(self.seed, step, "augmentation")
        return augment(audio, self.crop_samples, self.sample_rate, self.augmentation, draw)


def _counts(shares: Sequence[float], batch_size: int) -> list[int]:
    """Items of each corpus in a batch, by the largest remainder method."""
    total = sum(shares)
    exact = [share / total * batch_size for share in shares]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: batch_size - sum(counts)]:
        counts[i] += 1
    return counts
