"""Training batches of random crops of speech: a batch is a pure function of (seed, step)."""

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
from snac_runner.data.latents import LatentCache

_MAX_DRAWS = 8  # of a crop's start, before the loudest of them is taken
_PAUSE_LEVEL = 0.1  # re the RMS of the utterance (-20 dB): a crop below this level is a pause


def draw_start(audio: Tensor, length: int, draw: torch.Generator, *, grid: int = 1) -> int:
    """Draw the start of a crop of `length` samples of audio (1, T), a multiple of `grid`: the first draw that is not a
    pause, else the loudest of the draws."""
    last = audio.shape[-1] - length
    if last <= 0:
        return 0
    threshold = _PAUSE_LEVEL * _rms(audio)
    best, loudest = 0, -1.0
    for _ in range(_MAX_DRAWS):
        start = grid * int(torch.randint(last // grid + 1, (), generator=draw))
        level = _rms(audio[:, start : start + length])
        if level >= threshold:
            return start
        if level > loudest:
            best, loudest = start, level
    return best


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
    """

    audio: Tensor
    speakers: list[str]
    utterances: list[str]
    starts: list[float]
    lengths: list[int]
    latents: Tensor | None = None


class CropLoader:
    """Random crops of a split. Speakers are drawn uniformly, a speaker's utterances in proportion to their length.

    Decoded and resampled utterances are kept in a least-recently-used cache of `cache_bytes`, which does not affect the
    batches. Utterances are decoded whole: cut hour-long files into utterances first (segments in a manifest suffice).

    Args:
        corpus: the speech to draw from.
        split: "train", "dev" or "test".
        sample_rate: of the batches, in Hz (the codec's).
        crop_seconds: length of a crop, in s.
        batch_size: B.
        seed: of every draw, together with the step.
        latents: read the crops' latents from this cache; crops then start at whole latent frames.
        cache_bytes: size of the cache; 2 GB hold about 6 hours at 24 kHz.

    Attributes:
        utterances: utterance id -> utterance, of the split.
        utterances_of: speaker -> utterances.
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
        cache_bytes: int = 2 * 10**9,
    ) -> None:
        if batch_size < 1 or crop_seconds <= 0:
            raise UserError(f"batch_size {batch_size} and crop_seconds {crop_seconds} must be above 0")
        utterances = corpus.split(split)
        self.sample_rate = sample_rate
        self.crop_samples = max(1, round(crop_seconds * sample_rate))
        self.batch_size = batch_size
        self.seed = seed
        self.latents = latents
        self.steps_per_epoch = -(-len(utterances) // batch_size)
        self.speakers = corpus.speakers(split)
        self.utterances = {u.id: u for u in utterances}
        self.utterances_of = {s: [u for u in utterances if u.speaker == s] for s in self.speakers}
        self._weights = {
            s: torch.tensor([u.seconds for u in us], dtype=torch.float64) for s, us in self.utterances_of.items()
        }
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._free_bytes = cache_bytes

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
        of_batch = self.speakers_at(step)
        positions = range(self.batch_size)[rows]
        speakers = [of_batch[row] for row in positions]
        audio = torch.zeros(len(positions), 1, self.crop_samples)
        grid = self.latents.codec.hop_length if self.latents else 1
        utterances, starts, lengths, latents = [], [], [], []
        for number, (row, speaker) in enumerate(zip(positions, speakers, strict=True)):
            draw = generator(self.seed, step, "crops", row)
            choice = int(torch.multinomial(self._weights[speaker], 1, generator=draw))
            utterance = self.utterances_of[speaker][choice]
            whole = self.whole(utterance)
            start = draw_start(whole, self.crop_samples, draw, grid=grid)
            crop = whole[:, start : start + self.crop_samples]
            audio[number, :, : crop.shape[-1]] = crop
            utterances.append(utterance.id)
            starts.append(start / self.sample_rate)
            lengths.append(crop.shape[-1])
            if self.latents:
                latents.append(self.latents.at(utterance, start))
        return Batch(audio, speakers, utterances, starts, lengths, torch.stack(latents) if latents else None)

    def whole(self, utterance: Utterance) -> Tensor:
        """A whole utterance (1, T) at the loader's sample rate, from the cache if it is there."""
        if utterance.id in self._cache:
            self._cache.move_to_end(utterance.id)
            return self._cache[utterance.id]
        audio = load_audio(utterance, self.sample_rate)
        self._cache[utterance.id] = audio
        self._free_bytes -= audio.numel() * audio.element_size()
        while self._free_bytes < 0 and self._cache:
            _, oldest = self._cache.popitem(last=False)
            self._free_bytes += oldest.numel() * oldest.element_size()
        return audio

    @property
    def is_parallel(self) -> bool:
        """Whether two speakers of the split say the same text."""
        speaker_of: dict[str, str] = {}
        return any(u.text and speaker_of.setdefault(u.text, u.speaker) != u.speaker for u in self.utterances.values())


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
    if not loader.is_parallel:
        return None
    texts = [loader.utterances[name].text for name in loader.at(step, rows).utterances]
    waves = []
    for number, speaker in enumerate(targets):
        text = texts[number % len(texts)]
        same = next((u for u in loader.utterances_of[speaker] if text and u.text == text), None)
        waves.append(loader.whole(same)[0] if same else torch.zeros(0))
    lengths = torch.tensor([len(wave) for wave in waves])
    audio = torch.zeros(len(waves), 1, max(1, int(lengths.max())))
    for row, wave in enumerate(waves):
        audio[row, 0, : len(wave)] = wave
    return audio, lengths
