"""Batches of random crops for training: a pure function of (seed, step), whatever was drawn before.

Parallel speech: the same words from another speaker, where a corpus has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus, Utterance

_TRIES = 8  # draws of a crop before the loudest of them is taken
_QUIET = 0.1  # of the utterance's RMS, i.e. -20 dB: a crop below holds a pause, not speech


def draw_start(whole: Tensor, length: int, draw: torch.Generator) -> int:
    """Where in audio (1, T) to cut `length` samples: the first draw that is not a pause, else the loudest of them."""
    room = whole.shape[-1] - length
    if room <= 0:
        return 0
    enough = _QUIET * _level(whole)
    best, loudest = 0, -1.0
    for _ in range(_TRIES):
        start = int(torch.randint(room + 1, (), generator=draw))
        level = _level(whole[:, start : start + length])
        if level >= enough:
            return start
        if level > loudest:
            best, loudest = start, level
    return best


def _level(audio: Tensor) -> float:
    """RMS of audio (1, T), re full scale; by numpy, on one thread, which is faster for so little."""
    return float(np.sqrt(np.square(audio.numpy()).mean()))


@dataclass(frozen=True)
class Batch:
    """Crops of speech.

    Attributes:
        audio: (B, 1, T), float32, at the loader's rate; a crop shorter than T is followed by zeros.
        speakers: B names; all different where the split has B speakers.
        utterances: B utterance ids.
        starts: B times, in s from the utterance's beginning.
        lengths: B numbers of samples that are speech; the rest up to T is padding.
    """

    audio: Tensor
    speakers: list[str]
    utterances: list[str]
    starts: list[float]
    lengths: list[int]


class CropLoader:
    """Random crops of a split. Speakers are drawn uniformly, a speaker's utterances in proportion to their length.

    Decoded and resampled utterances are kept in memory up to `cache_bytes`, least recently used first out; what a batch
    holds does not depend on it. An utterance is decoded as a whole, so hour-long files belong cut into utterances (or
    into a manifest's stretches) first.

    Args:
        corpus: where to draw from.
        split: "train", "dev" or "test".
        sample_rate: of the batches, in Hz: the codec's.
        crop_seconds: length of a crop, in s.
        batch_size: B.
        seed: of every draw, together with the step.
        cache_bytes: most bytes of audio to keep; 2 GB are about 6 hours at 24 kHz.

    Raises:
        UserError: if the split is empty or a number is not positive.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sample_rate: int,
        crop_seconds: float,
        batch_size: int,
        seed: int,
        *,
        cache_bytes: int = 2 * 10**9,
    ) -> None:
        if batch_size < 1 or crop_seconds <= 0:
            raise UserError(f"batch_size {batch_size} and crop_seconds {crop_seconds} must be above 0")
        utterances = corpus.split(split)
        self.sample_rate = sample_rate
        self.crop_samples = max(1, round(crop_seconds * sample_rate))
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(utterances) // batch_size)
        self.speakers = corpus.speakers(split)
        self.utterances = {u.id: u for u in utterances}
        self.of = {speaker: [u for u in utterances if u.speaker == speaker] for speaker in self.speakers}
        self._weights = {s: torch.tensor([u.seconds for u in us], dtype=torch.float64) for s, us in self.of.items()}
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._room = cache_bytes

    def at(self, step: int) -> Batch:
        """The batch of a step: equal for equal (seed, step), in every process and order of calls."""
        order = generator(self.seed, step, "crop speakers")
        rows: list[int] = []
        while len(rows) < self.batch_size:  # all speakers once before any comes again
            rows += torch.randperm(len(self.speakers), generator=order).tolist()
        speakers = [self.speakers[i] for i in rows[: self.batch_size]]
        audio = torch.zeros(self.batch_size, 1, self.crop_samples)
        utterances, starts, lengths = [], [], []
        for row, speaker in enumerate(speakers):
            draw = generator(self.seed, step, "crops", row)
            utterance = self.of[speaker][int(torch.multinomial(self._weights[speaker], 1, generator=draw))]
            whole = self.whole(utterance)
            start = draw_start(whole, self.crop_samples, draw)
            crop = whole[:, start : start + self.crop_samples]
            audio[row, :, : crop.shape[-1]] = crop
            utterances.append(utterance.id)
            starts.append(start / self.sample_rate)
            lengths.append(crop.shape[-1])
        return Batch(audio, speakers, utterances, starts, lengths)

    def whole(self, utterance: Utterance) -> Tensor:
        """An utterance (1, T) at the loader's rate, from memory where it is there."""
        if utterance.id in self._cache:
            self._cache.move_to_end(utterance.id)
            return self._cache[utterance.id]
        audio = load_audio(utterance, self.sample_rate)
        self._cache[utterance.id] = audio
        self._room -= audio.numel() * audio.element_size()
        while self._room < 0 and self._cache:
            _, oldest = self._cache.popitem(last=False)
            self._room += oldest.numel() * oldest.element_size()
        return audio


def parallel_speech(loader: CropLoader, step: int, targets: Sequence[str], items: int) -> tuple[Tensor, Tensor] | None:
    """Whole utterances in which targets say what the first items of a step's batch are cut from.

    Args:
        loader: of the batches.
        step: which batch.
        targets: N * items speakers, items fastest.
        items: how many of the batch count.

    Returns:
        audio (N * items, 1, T') padded with zeros, and lengths in samples (N * items,), 0 where a target never says it;
        None where no two speakers of the split say the same.
    """
    if not _is_parallel(loader):
        return None
    texts = [loader.utterances[name].text for name in loader.at(step).utterances[:items]]
    spoken = []
    for number, speaker in enumerate(targets):
        text = texts[number % items]
        same = next((u for u in loader.of[speaker] if text and u.text == text), None)
        spoken.append(loader.whole(same)[0] if same else torch.zeros(0))
    lengths = torch.tensor([len(wave) for wave in spoken])
    audio = torch.zeros(len(spoken), 1, max(1, int(lengths.max())))
    for row, wave in enumerate(spoken):
        audio[row, 0, : len(wave)] = wave
    return audio, lengths


def _is_parallel(loader: CropLoader) -> bool:
    said: dict[str, str] = {}
    return any(
        utterance.text and said.setdefault(utterance.text, utterance.speaker) != utterance.speaker
        for utterance in loader.utterances.values()
    )
