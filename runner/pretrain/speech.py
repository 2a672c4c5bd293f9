"""Batches of speech for a base codec: several corpora in fixed shares, changed in level and speed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from runner.data import Corpus, CropLoader
from runner.pretrain.augmenting import augment
from runner.pretrain.settings import Augmentation
from snac_core.seeding import derive, generator


class SpeechMix:
    """Crops from the train splits of several corpora: a pure function of (seed, step).

    Args:
        corpora: each with its share of every batch.
        sample_rate: in Hz.
        crop_samples: T.
        batch: B.
        augmentation: what happens to the crops.
        seed: of every draw.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Corpus, float]],
        sample_rate: int,
        crop_samples: int,
        batch: int,
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
            for (corpus, _), count in zip(corpora, _counts([s for _, s in corpora], batch), strict=True)
            if count
        ]
        self.steps_per_epoch = max(loader.steps_per_epoch for loader in self.loaders)

    def at(self, step: int) -> Tensor:
        """The batch of a step, (B, 1, T)."""
        audio = torch.cat([loader.at(step).audio for loader in self.loaders])
        draw = generator(self.seed, step, "augmentation")
        return augment(audio, self.crop_samples, self.sample_rate, self.augmentation, draw)


class Ahead:
    """Batches of a pure function of the step, prepared by threads while the step before is computed.

    Args:
        mixes: equal ones, one per thread, so that no thread waits for another's memory.
        last: no step from here on is prepared.
    """

    def __init__(self, mixes: Sequence[SpeechMix], last: int) -> None:
        self.mixes = mixes
        self.last = last
        self.steps_per_epoch = mixes[0].steps_per_epoch
        self.threads = [ThreadPoolExecutor(1) for _ in mixes]
        self.coming: dict[int, Future[Tensor]] = {}

    def at(self, step: int) -> Tensor:
        """The batch of a step, (B, 1, T); the next ones are begun."""
        for number in range(step, min(self.last, step + 2 * len(self.mixes))):
            if number not in self.coming:
                worker = number % len(self.mixes)
                self.coming[number] = self.threads[worker].submit(self.mixes[worker].at, number)
        return self.coming.pop(step).result() if step in self.coming else self.mixes[0].at(step)

    def close(self) -> None:
        """Prepare no more."""
        for thread in self.threads:
            thread.shutdown(cancel_futures=True)


def _counts(shares: Sequence[float], batch: int) -> list[int]:
    """Whole numbers that add up to `batch`, near to the shares (largest remainders)."""
    total = sum(shares)
    exact = [share / total * batch for share in shares]
    counts = [int(e) for e in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: batch - sum(counts)]:
        counts[i] += 1
    return counts
