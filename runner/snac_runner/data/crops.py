"""Training batches of random crops of speech: a batch is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.step import Imitation
from snac_runner.data.audio import load_audio, load_stretch, resampled_length
from snac_runner.data.corpus import Corpus, Utterance
from snac_runner.data.latents import ImitationCache, LatentCache

_MAX_DRAWS = 8  # of a crop's start, before the loudest of them is taken
_PAUSE_LEVEL = 0.1  # re the RMS of the utterance (-20 dB): a crop below this level is a pause


def draw_start(audio: Tensor, length: int, draw: torch.Generator) -> int:
    """Draw the start of a crop of `length` samples of audio (1, T): the first draw that is not a pause, else the
    loudest of the draws."""
    crop = partial(_slice, audio, length)
    return _draw_crop(audio.shape[-1] - length, _PAUSE_LEVEL * _rms(audio), crop, draw)[0]


def _slice(audio: Tensor, length: int, start: int) -> Tensor:
    return audio[:, start : start + length]


def _draw_crop(
    last: int, threshold: float, crop: Callable[[int], Tensor], draw: torch.Generator, grid: int = 1
) -> tuple[int, Tensor]:
    """A start up to `last`, a multiple of `grid`, and the crop (1, n) there; see `draw_start`."""
    if last <= 0:
        return 0, crop(0)
    best, loudest, kept = 0, -1.0, torch.empty(0)
    for _ in range(_MAX_DRAWS):
        start = grid * int(torch.randint(last // grid + 1, (), generator=draw))
        audio = crop(start)
        level = _rms(audio)
        if level >= threshold:
            return start, audio
        if level > loudest:
            best, loudest, kept = start, level, audio
    return best, kept


def _rms(audio: Tensor) -> float:
    """RMS of audio (1, T), re full scale; numpy on one thread is faster than torch for arrays of this size."""
    return float(np.sqrt(np.square(audio.numpy()).mean()))


@dataclass(frozen=True)
class Batch:
    """Crops of speech.

    Attributes:
        audio: (B, 1, T), float32, at the loader's sample rate; a crop shorter than T is padded with zeros.
        speakers: B names; all different if the split has at least B speakers.
        utterances: B utterance ids.
        starts: B times, in s from the start of the utterance.
        lengths: B lengths in samples, without padding.
        latents: (B, C, F) of the codec, if the loader has a cache of them.
        speech: latent (B, C, R) of other parts of the same utterances, if the loader reads it.
        imitations: the same crops in the voices of other speakers, twice; once if the loader has one cache of them.
    """

    audio: Tensor
    speakers: list[str]
    utterances: list[str]
    starts: list[float]
    lengths: list[int]
    latents: Tensor | None = None
    speech: Tensor | None = None
    imitations: tuple[Imitation, ...] = ()


class CropLoader:
    """Random crops of a split. Speakers are drawn uniformly, a speaker's utterances in proportion to their length.

    Only the stretches that become crops are decoded.

    Args:
        corpus: the speech to draw from.
        split: "train", "dev" or "test".
        sample_rate: of the batches, in Hz (the codec's).
        crop_seconds: length of a crop, in s.
        batch_size: B.
        seed: of every draw, together with the step.
        latents: read the crops' latents from this cache; crops then start at whole latent frames.
        imitations: read each crop in other voices from two of these, drawn uniformly; needs `latents`.
        speech_frames: R, of other parts of the utterances to read beside each crop; needs `latents`.

    Attributes:
        utterances: of the split.
        steps_per_epoch: ceil(number of utterances / B).

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
        latents: LatentCache | None = None,
        imitations: Sequence[ImitationCache] = (),
        speech_frames: int = 0,
    ) -> None:
        if batch_size < 1 or crop_seconds <= 0:
            raise UserError(f"batch_size {batch_size} and crop_seconds {crop_seconds} must be above 0")
        self.utterances = corpus.split(split)
        self.sample_rate = sample_rate
        self.crop_samples = max(1, round(crop_seconds * sample_rate))
        self.batch_size = batch_size
        self.seed = seed
        self.latents = latents
        self.imitations = imitations
        self.speech_frames = speech_frames
        self.steps_per_epoch = -(-len(self.utterances) // batch_size)
        self.speakers = self.utterances.speakers

    def speakers_at(self, step: int) -> list[str]:
        """The B speakers of a step's batch; reads no audio."""
        order = generator(self.seed, step, "crop speakers")
        drawn: list[int] = []
        while len(drawn) < self.batch_size:  # all speakers once before any speaker again
            drawn += torch.randperm(len(self.speakers), generator=order).tolist()
        return [self.speakers[i] for i in drawn[: self.batch_size]]

    def at(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step; the same for equal (seed, step) in every process and in every order of calls.

        Args:
            step: which batch.
            rows: which of its items to read; all by default.
        """
        chosen = self._chosen(step, rows)
        audio = torch.zeros(len(chosen), 1, self.crop_samples)
        starts, lengths, latents, speech = [], [], [], []
        voices: list[list[Imitation]] = []  # of each item
        for number, (utterance, draw) in enumerate(chosen):
            start, crop = self._crop(utterance, draw)
            audio[number, :, : crop.shape[-1]] = crop
            starts.append(start / self.sample_rate)
            lengths.append(crop.shape[-1])
            if self.latents:
                latents.append(self.latents.at(utterance, start))
            caches = self._voices(draw)
            if self.latents and self.speech_frames:
                speech.append(self._speech(self.latents, utterance, start, draw))
            voices.append(
                [
                    Imitation(
                        cache.at(utterance, start),
                        cache.embedding_of(utterance),
                        self._speech(cache, utterance, start, draw) if self.speech_frames else None,
                    )
                    for cache in caches
                ]
            )
        speakers, ids = [u.speaker for u, _ in chosen], [u.id for u, _ in chosen]
        imitations = tuple(_batched(of_items) for of_items in zip(*voices, strict=True))
        return Batch(
            audio, speakers, ids, starts, lengths,
            torch.stack(latents) if latents else None, torch.stack(speech) if speech else None, imitations,
        )  # fmt: skip

    def utterances_at(self, step: int, rows: slice = slice(None)) -> list[Utterance]:
        """The utterances that the crops of a step are from; reads no audio."""
        return [utterance for utterance, _ in self._chosen(step, rows)]

    def _chosen(self, step: int, rows: slice) -> list[tuple[Utterance, torch.Generator]]:
        """The utterance of each item, and the generator that then draws the start of its crop."""
        speakers = self.speakers_at(step)
        chosen = []
        for item in range(self.batch_size)[rows]:
            draw = generator(self.seed, step, "crops", item)
            own = self.utterances.rows_of(speakers[item])
            choice = int(torch.multinomial(torch.from_numpy(self.utterances.seconds[own]), 1, generator=draw))
            chosen.append((self.utterances[int(own[choice])], draw))
        return chosen

    def _voices(self, draw: torch.Generator) -> list[ImitationCache]:
        """Two different caches of imitations, or as many as there are."""
        caches = list(self.imitations)
        return [caches.pop(int(torch.randint(len(caches), (), generator=draw))) for _ in range(min(2, len(caches)))]

    def _speech(self, cache: LatentCache, utterance: Utterance, start: int, draw: torch.Generator) -> Tensor:
        return cache.speech_outside(utterance, start, self.speech_frames, draw)

    def _crop(self, utterance: Utterance, draw: torch.Generator) -> tuple[int, Tensor]:
        """The start in samples, and the crop (1, n); see `draw_start`."""
        rate = utterance.sample_rate
        samples = resampled_length(round(utterance.seconds * rate), rate, self.sample_rate)
        crop = partial(self._stretch, utterance)
        grid = self.latents.hop_length if self.latents else 1
        return _draw_crop(samples - self.crop_samples, _PAUSE_LEVEL * utterance.level, crop, draw, grid)

    def _stretch(self, utterance: Utterance, start: int) -> Tensor:
        return load_stretch(utterance, self.sample_rate, start, self.crop_samples)


def _batched(items: Sequence[Imitation]) -> Imitation:
    """The imitations of single items, as one of a batch."""
    speech = [item.speech for item in items if item.speech is not None]
    return Imitation(
        torch.stack([item.latent for item in items]),
        torch.stack([item.embedding for item in items]),
        torch.stack(speech) if speech else None,
    )


def parallel_speech(loader: CropLoader, step: int, targets: Sequence[str], rows: slice) -> tuple[Tensor, Tensor] | None:
    """Whole utterances of target speakers with the same text as items of a batch.

    Args:
        loader: of the batches.
        step: which batch.
        targets: N * items speakers; the item changes fastest.
        rows: which items of the batch to use.

    Returns:
        audio (N * items, 1, T') padded with zeros, and lengths in samples (N * items,), 0 if the target does not
        have the text; None if no two speakers of the split say the same text.
    """
    if not loader.utterances.is_parallel:
        return None
    texts = [utterance.text for utterance in loader.utterances_at(step, rows)]
    waves = []
    for number, speaker in enumerate(targets):
        text = texts[number % len(texts)]
        own = (loader.utterances[row] for row in loader.utterances.rows_of(speaker).tolist())
        same = next((u for u in own if text and u.text == text), None)
        waves.append(load_audio(same, loader.sample_rate)[0] if same else torch.zeros(0))
    lengths = torch.tensor([len(wave) for wave in waves])
    audio = torch.zeros(len(waves), 1, max(1, int(lengths.max())))
    for row, wave in enumerate(waves):
        audio[row, 0, : len(wave)] = wave
    return audio, lengths
