"""Other voices out of the ones there are: changes of level, speed (with pitch and formants) and formants alone.

Batches of speech for a base codec: several corpora in fixed shares, changed in level and speed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snac_core.augment import move_formants, read_faster
from snac_core.errors import UserError
from snac_core.seeding import derive, generator
from snac_runner.data.corpus import Corpus
from snac_runner.data.crops import CropLoader
from snac_runner.pretrain.settings import Augmentation


def augment(audio: Tensor, samples: int, sample_rate: int, how: Augmentation, draw: torch.Generator) -> Tensor:
    """Change each item by amounts of its own, a pure function of the generator's state.

    Args:
        audio: (B, 1, T') with T' at least `samples * (1 + speed)`.
        samples: T of the result (B, 1, T).
        sample_rate: in Hz.
        how: by how much.
        draw: four numbers an item are drawn.
    """
    gain, chance, speed, formant = torch.rand(len(audio), 4, generator=draw).T
    changed = chance < how.changed
    made: Tensor = audio[..., :samples].clone()
    if changed.any():
        moved = read_faster(audio[changed], 1 + (2 * speed[changed] - 1) * how.speed, samples)
        if how.formant:
            moved = move_formants(moved, sample_rate, 1 + (2 * formant[changed] - 1) * how.formant)
        made[changed] = moved
    made *= (10 ** ((2 * gain - 1) * how.gain_db / 20)).view(-1, 1, 1)
    return made / made.abs().amax(dim=-1, keepdim=True).clamp(min=1)


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


class PrefetchingLoader:
    """Batches of a pure function of the step, prepared by other processes while the steps before are computed.

    In order, that is: another step than the next one starts the processes anew.

    Args:
        mix: of speech.
        last: no step from here on is prepared.
        workers: how many processes at most; each keeps what it has decoded.
    """

    def __init__(self, mix: SpeechMix, last: int, workers: int) -> None:
        self.mix = mix
        self.last = last
        free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = min(workers, free)
        self.steps_per_epoch = mix.steps_per_epoch
        self.next = 0
        self.coming: Iterator[Tensor | UserError] | None = None

    def at(self, step: int) -> Tensor:
        """The batch of a step, (B, 1, T); those of the steps after it are begun."""
        if not 0 <= step < self.last:
            return self.mix.at(step)
        if self.coming is None or step != self.next:
            self.coming = iter(
                DataLoader(
                    _Steps(self.mix),
                    batch_size=None,
                    sampler=range(step, self.last),
                    num_workers=self.workers,
                    prefetch_factor=4,
                    pin_memory=torch.cuda.is_available(),
                    worker_init_fn=_leave_stopping,
                )
            )
        self.next = step + 1
        batch = next(self.coming)
        if isinstance(batch, UserError):
            raise batch
        return batch

    def close(self) -> None:
        """Prepare no more."""
        self.coming = None


def _leave_stopping(_worker: int) -> None:
    """Signals reach a whole group of processes; the one that trains ends the others when it has saved."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Steps(Dataset["Tensor | UserError"]):
    """What a DataLoader can ask for the batch of a step; an error would come back as a traceback."""

    def __init__(self, mix: SpeechMix) -> None:
        self.mix = mix

    def __getitem__(self, step: int) -> Tensor | UserError:
        try:
            return self.mix.at(step)
        except UserError as error:
            return error


def _counts(shares: Sequence[float], batch: int) -> list[int]:
    """Whole numbers that add up to `batch`, near to the shares (largest remainders)."""
    total = sum(shares)
    exact = [share / total * batch for share in shares]
    counts = [int(e) for e in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: batch - sum(counts)]:
        counts[i] += 1
    return counts
