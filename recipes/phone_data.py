"""Things to say: many different sentences, from the words and the bigrams of pocketsphinx's English model.

Each word is one of a few drawn by how often they are said (evened out, so that rare words come up), chosen by how well
it follows the word before. What comes out reads like English without meaning, and no two sentences are alike: a
recogniser that learns from it hears every phone in many surroundings.


What pocketsphinx reads in speech whose text is not known: words with their times, kept on disk.

Speech with known phones: espeak-ng's own, recorded speech, and both as a codec gives them back.

What the phone recogniser is trained on: stretches of speech with their phones, and batches of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import write_bytes, write_text
from snac_core.seeding import derive, generator
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Utterance
from snac_runner.data.espeak import voice
from snac_runner.data.synth import SENTENCES
from snac_runner.evaluate.content import RATE, Recogniser
from snac_runner.evaluate.phone_recogniser import FRAME, PHONES, SAMPLE_RATE, phones_of, spans
from snac_runner.pretrain.evaluate import decode_levels

_EVENED = 0.7  # exponent on a word's frequency
_CANDIDATES = 12
_LOG_BASE = 1.0001  # of the scores of pocketsphinx


class Writer:
    """Writes sentences; those it is told to avoid, the built-in ones, never come out.

    Raises:
        UserError: if pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError:
            raise UserError(
                "sentences need the words of the package pocketsphinx: install the extra [judges]"
            ) from None
        self._model = Decoder(samprate=16000, loglevel="FATAL").get_lm("_default")
        lines = Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        words = sorted(
            {w for w in (line.partition(" ")[0] for line in lines) if re.fullmatch(r"[a-z]{2,}('[a-z]+)?|[ai]", w)}
        )
        scores = np.array([self._model.prob([word]) for word in words], dtype=np.float64)
        known = scores > scores.min()
        self.words = [word for word, is_known in zip(words, known, strict=True) if is_known]
        share = np.exp(_EVENED * np.log(_LOG_BASE) * scores[known])
        self._share = np.cumsum(share / share.sum())
        self._avoided = {text.lower().rstrip(".?!") for text in SENTENCES}

    def write(self, count: int, seed: int, shortest: int = 4, longest: int = 10) -> list[str]:
        """`count` different sentences of `shortest` to `longest` words; a pure function of the arguments."""
        draw = np.random.default_rng(derive(seed, "sentences"))
        texts: dict[str, None] = {}
        while len(texts) < count:
            length = int(draw.integers(shortest, longest + 1))
            sentence: list[str] = []
            for _ in range(length):
                places = np.searchsorted(self._share, draw.random(_CANDIDATES)).clip(max=len(self.words) - 1)
                sentence.append(self._following(sentence, [self.words[i] for i in places], float(draw.random())))
            text = " ".join(sentence)
            if text not in self._avoided:
                texts[text] = None
        return list(texts)

    def _following(self, before: list[str], candidates: list[str], chance: float) -> str:
        """One of the candidates, by how likely it is after the last word relative to by itself."""
        if not before:
            return candidates[0]
        gain = np.array([self._model.prob([w, before[-1]]) - self._model.prob([w]) for w in candidates])
        likely = np.exp(np.log(_LOG_BASE) * (gain - gain.max()))
        return candidates[int(np.searchsorted(np.cumsum(likely / likely.sum()), chance).clip(max=len(candidates) - 1))]


class Word(NamedTuple):
    """A word, or silence (text ""), from `start` to `end`, in s."""

    text: str
    start: float
    end: float


Reading = list[Word]


def read_all(
    utterances: Sequence[Utterance], path: Path, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Reading]:
    """Utterance id -> what is read in it; readings that `path` (JSON lines) holds are not made again."""
    readings: dict[str, Reading] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            readings[entry["id"]] = [Word(*word) for word in entry["words"]]
    recognise = Recogniser()
    for number, u in enumerate(utterances):
        if u.id in readings:
            continue
        readings[u.id] = [Word(*word) for word in recognise.timed(load_audio(u, RATE), RATE)]
        lines = [json.dumps({"id": key, "words": words}) for key, words in readings.items()]
        write_text(path, "\n".join(lines) + "\n")
        if progress:
            progress(number + 1, len(utterances))
    return readings


LONGEST = 16.0  # s; longer pieces are left out
SPEEDS = (0.88, 1.0, 1.14)

Progress = Callable[[int, int], None]


def say_all(
    texts: Sequence[str], voices: Sequence[str], seed: int = 0, *, progress: Progress | None = None
) -> list[Piece]:
    """Each text by one of the voices, in turn; speed, pitch and intonation are drawn. Foreign words are left out."""
    pieces = []
    for number, name in enumerate(voices):
        draw = np.random.default_rng(derive(seed, name, "manner"))
        with voice(name, derive(seed, name)) as speaker:
            for text in texts[number :: len(voices)]:
                speaker.adjust(
                    rate=int(draw.integers(125, 230)),
                    pitch=int(draw.integers(20, 81)),
                    spread=int(draw.integers(15, 86)),
                )
                samples = torch.from_numpy(speaker.say(text).copy())
                try:
                    said = spans(speaker.phoneme_starts)
                except UserError:  # it holds a foreign word
                    continue
                wave = resample(samples[: said[-1][2]], speaker.sample_rate, SAMPLE_RATE)
                factor = SAMPLE_RATE / speaker.sample_rate
                timed = [(phone, round(start * factor), round(end * factor)) for phone, start, end in said]
                phones = [phone for phone, _ in groupby(phone for phone, _, _ in said)]
                pieces.append(piece(0.3 * wave / wave.abs().max(), phones, timed))
        if progress:
            progress(number + 1, len(voices))
    return pieces


def cut_all(
    utterances: Iterable[Utterance], readings: dict[str, Reading], seed: int = 0, speeds: Sequence[float] = SPEEDS
) -> list[Piece]:
    """Recorded speech at several speeds. A known text is taken whole, a reading is cut between words."""
    pieces = []
    for u in utterances:
        wave = load_audio(u, SAMPLE_RATE)[0]
        for speed in speeds:
            played = resample(wave, round(SAMPLE_RATE * speed), SAMPLE_RATE) if speed != 1 else wave
            if u.text is not None:
                parts: Iterable[tuple[float, float, str]] = [(0.0, u.seconds, u.text)]
            else:
                parts = _cut(readings[u.id], np.random.default_rng(derive(seed, u.id, speed, "cuts")))
            for start, end, text in parts:
                if (end - start) / speed > LONGEST:
                    continue
                try:
                    phones = phones_of(text)
                except UserError:  # a word that espeak-ng says with a foreign sound
                    continue
                first, last = (round(t / speed * SAMPLE_RATE) for t in (start, end))
                pieces.append(piece(played[first:last], phones))
    return pieces


def _cut(reading: Reading, draw: np.random.Generator) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of parts of 2 to 6 s, cut where a word begins; a rest under a second goes to nobody."""
    words: list[str] = []
    start, wanted = None, float(draw.uniform(2, 6))
    for word in reading:
        if start is None:
            start = word.start
        if words and word.start - start >= wanted:
            yield start, word.start, " ".join(words)
            words, start, wanted = [], word.start, float(draw.uniform(2, 6))
        if word.text:
            words.append(word.text)
    if words and start is not None and reading[-1].end - start >= 1:
        yield start, reading[-1].end, " ".join(words)


def through_codec(
    codec: SNAC, pieces: Sequence[Piece], share: float, seed: int = 0, *, progress: Progress | None = None
) -> list[Piece]:
    """A share of the pieces as the codec gives them back; of every fourth of them only the two coarsest levels."""
    draw = np.random.default_rng(derive(seed, "coded"))
    chosen = [p for p in pieces if draw.random() < share]
    rate, coded = codec.sampling_rate, []
    for number, p in enumerate(chosen):
        audio = resample(p.wave.float()[None, None] / 32768, SAMPLE_RATE, rate)
        levels = min(2, codec.n_codebooks) if number % 4 == 3 else None
        with torch.inference_mode():
            heard = decode_levels(codec, codec.encode(audio), levels, audio.shape[-1])
        wave = resample(heard[0, 0].clone(), rate, SAMPLE_RATE)
        coded.append(Piece((wave.clamp(-1, 1) * 32767).round().to(torch.int16), p.phones, p.frames))
        if progress:
            progress(number + 1, len(chosen))
    return coded


_CLASS = {phone: index + 1 for index, phone in enumerate(PHONES)}  # 0 is CTC's blank


UNKNOWN = -100
"""Class of a frame whose phone is not known; what torch's cross entropy ignores."""


@dataclass(frozen=True)
class Piece:
    """A stretch of speech.

    Attributes:
        wave: int16 (T,) at 16 kHz.
        phones: classes of what is said, uint8 (L,).
        frames: the class of each frame of the network, uint8 (F,), 0 in pauses; (0,) where times are not known.
    """

    wave: Tensor
    phones: Tensor
    frames: Tensor


def piece(wave: Tensor, phones: Sequence[str], spans: Sequence[tuple[str, int, int]] = ()) -> Piece:
    """A piece of a float wave (T,) in [-1, 1], names of phones and, where known, their starts and ends in samples."""
    frames = torch.zeros(-(-len(wave) // FRAME) if spans else 0, dtype=torch.uint8)
    for phone, start, end in spans:
        frames[-(-start // FRAME) : -(-end // FRAME)] = _CLASS[phone]
    classes = torch.tensor([_CLASS[p] for p in phones], dtype=torch.uint8)
    return Piece((wave.clamp(-1, 1) * 32767).round().to(torch.int16), classes, frames)


class Batch(NamedTuple):
    """Audio (B, T), phones of all items (sum of L,), how many each has (B,), classes of the frames (B, F)."""

    audio: Tensor
    phones: Tensor
    counts: Tensor
    frames: Tensor


def store(path: Path, pieces: Sequence[Piece]) -> None:
    """Write pieces as one safetensors file."""
    table = {
        "wave": torch.cat([p.wave for p in pieces]),
        "samples": torch.tensor([len(p.wave) for p in pieces]),
        "phones": torch.cat([p.phones for p in pieces]),
        "count": torch.tensor([len(p.phones) for p in pieces]),
        "frames": torch.cat([p.frames for p in pieces]),
        "timed": torch.tensor([len(p.frames) for p in pieces]),
    }
    write_bytes(path, save(table))


def restore(path: Path) -> list[Piece]:
    """Read what `store` wrote."""
    table = load_file(path)
    waves = torch.split(table["wave"], table["samples"].tolist())
    phones = torch.split(table["phones"], table["count"].tolist())
    frames = torch.split(table["frames"], table["timed"].tolist())
    return [Piece(*parts) for parts in zip(waves, phones, frames, strict=True)]


class Material:
    """Pieces of several kinds, each kind drawn as often as its weight says."""

    def __init__(self, kinds: Sequence[tuple[float, Sequence[Piece]]]) -> None:
        pieces = [(p, weight / len(kind)) for weight, kind in kinds for p in kind]
        pieces.sort(key=lambda pair: len(pair[0].wave))
        self.pieces = [p for p, _ in pieces]
        self.samples = torch.tensor([len(p.wave) for p in self.pieces])
        self._reach = torch.tensor([weight for _, weight in pieces], dtype=torch.float64).cumsum(0)

    @property
    def hours(self) -> float:
        return float(self.samples.sum()) / SAMPLE_RATE / 3600

    def batch(self, seconds: float, seed: int, step: int) -> Batch:
        """About `seconds` of speech, a function of (seed, step).

        One piece, drawn at random, sets the length; the others are no longer and no shorter than 0.6 of it. Each
        begins at a random frame of its row, silence around it.
        """
        draw = generator(seed, step, "phone pieces")

        def chance() -> float:
            return float(torch.rand((), generator=draw, dtype=torch.float64))

        longest = self._at(chance() * float(self._reach[-1]))
        most = int(self.samples[longest])
        shortest = int(torch.searchsorted(self.samples, int(0.6 * most)))
        low = float(self._reach[shortest - 1]) if shortest else 0.0
        high = float(self._reach[longest])
        width = (most // 4800 + 2) * 4800  # a length that Fourier transforms are quick at, and whole frames
        count = max(2, round(seconds * SAMPLE_RATE / width))
        chosen = [
            self.pieces[longest],
            *(self.pieces[self._at(low + chance() * (high - low))] for _ in range(count - 1)),
        ]
        audio = torch.zeros(count, width)
        frames = torch.zeros(count, width // FRAME + 1, dtype=torch.long)
        for row, classes, p in zip(audio, frames, chosen, strict=True):
            start = int(chance() * ((width - len(p.wave)) // FRAME + 1))
            row[start * FRAME : start * FRAME + len(p.wave)] = p.wave.float() / 32768
            if len(p.frames):
                classes[start : start + len(p.frames)] = p.frames.long()
            else:
                classes[:] = UNKNOWN
        counts = torch.tensor([len(p.phones) for p in chosen])
        return Batch(audio, torch.cat([p.phones for p in chosen]).long(), counts, frames)

    def _at(self, reach: float) -> int:
        return min(int(torch.searchsorted(self._reach, reach, right=True)), len(self.pieces) - 1)
