"""What a content judge can tell apart: its errors on speech, on a codec's output of it, and on other words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from time import process_time

import torch
from torch import Tensor

from runner.data.audio import load_audio, resample
from runner.data.corpus import Corpus
from runner.error_rate import error_rate
from runner.phones.alphabet import phones_of
from runner.phones.recogniser import PhoneRecogniser
from runner.pretrain.words import RATE, Recogniser
from snac_core.codec import SNAC
from snac_core.errors import UserError

Units = tuple[str, ...]


@dataclass(frozen=True)
class Judge:
    """Something that reads: from a text, and from audio (1, T) at a rate, to phones or words."""

    name: str
    spell: Callable[[str], Units]
    read: Callable[[Tensor, int], Units]


@dataclass(frozen=True)
class Range:
    """Mean error rates per utterance, 0 to 1.

    Attributes:
        utterances: how many.
        known: whether errors are against texts; else against the judge's own reading of the original.
        original: of the speech itself; 0 where no text is known.
        bare: of the codec's output.
        mismatched: of the codec's output against what another utterance says.
        above_half: share of utterances of which the codec's output has more than half wrong.
        real_time: CPU seconds per second of speech that reading takes.
    """

    utterances: int
    known: bool
    original: float
    bare: float
    mismatched: float
    above_half: float
    real_time: float

    @property
    def range(self) -> float:
        return self.mismatched - self.bare


def phone_judge(weights: str | None = None) -> Judge:
    """The recogniser of this project."""
    return Judge("phones", phones_of, PhoneRecogniser(weights))


def word_judge() -> Judge:
    """pocketsphinx, by its words."""
    recognise = Recogniser()

    def words(text: str) -> Units:
        return tuple(re.findall(r"[a-z']+", text.lower()))

    return Judge("pocketsphinx, words", words, lambda audio, rate: words(recognise(audio, rate)))


def spelt_judge() -> Judge:
    """pocketsphinx, by the phones of its words: the same units as ours."""
    recognise = Recogniser()

    def read(audio: Tensor, rate: int) -> Units:
        words = recognise(audio, rate)
        return phones_of(words) if words else ()

    return Judge("pocketsphinx, phones", phones_of, read)


def measure(judge: Judge, corpus: Corpus, split: str, codec: SNAC | None, *, most: int = 64) -> Range:
    """The errors of a judge on the utterances of a split, evenly chosen, and its range on a codec's output of them.

    Without a codec the speech itself stands for its output.

    Raises:
        UserError: if the split has fewer than two utterances that the judge reads anything in.
    """
    utterances = corpus.splits.get(split, ())
    chosen = utterances[:: max(1, -(-len(utterances) // most))]
    said: list[Units] = []
    originals, heard = [], []
    seconds = spent = 0.0
    for u in chosen:
        audio = load_audio(u, RATE)
        begun = process_time()
        original = judge.read(audio, RATE)
        spent, seconds = spent + process_time() - begun, seconds + audio.shape[-1] / RATE
        truth = judge.spell(u.text) if u.text else original
        if truth:
            said.append(truth)
            originals.append(error_rate(truth, original))
            heard.append(judge.read(_bare(codec, audio), RATE))
    if len(set(said)) < 2:
        raise UserError(f"{corpus.name} has no two utterances in {split} that the judge {judge.name} can tell apart")
    bare = [error_rate(truth, h) for truth, h in zip(said, heard, strict=True)]
    other = [error_rate(_another(said, index), h) for index, h in enumerate(heard)]
    return Range(
        len(said),
        all(u.text for u in chosen),
        fmean(originals),
        fmean(bare),
        fmean(other),
        fmean(rate > 0.5 for rate in bare),
        spent / seconds,
    )


def _another(said: Sequence[Units], index: int) -> Units:
    """What the next utterance says that says something else."""
    return next(t for t in (*said[index + 1 :], *said[:index]) if t != said[index])


def _bare(codec: SNAC | None, audio: Tensor) -> Tensor:
    """The codec's output (1, T) of audio (1, T), both at RATE, its noise fixed."""
    if codec is None:
        return audio
    given = resample(audio, RATE, codec.sampling_rate)[None]
    with torch.inference_mode(), codec.fixed_noise(0):
        coded = codec(given)[0][0]
    return resample(coded.clone(), codec.sampling_rate, RATE)
