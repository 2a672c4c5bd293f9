"""Training data of the phone recogniser: speech clips with their phones, and batches of them.

- `SentenceGenerator` and `synthesize_clips`: random sentences spoken by espeak-ng, which reports phones and times.
- `transcribe` and `recorded_clips`: recorded speech. Where no text is known, pocketsphinx transcribes it.
- `coded_clips`: clips after a codec.
- `ClipSampler`: batches of several kinds of clips.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

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
from snac_runner.evaluate.phone_recogniser import FRAME, PHONES, SAMPLE_RATE, phones_of, spans
from snac_runner.pretrain.evaluate import decode_levels

UNKNOWN = -100
"""Class of a frame with an unknown phone; torch's cross entropy ignores it."""

MAX_SECONDS = 16.0  # longer clips are left out
SPEEDS = (0.88, 1.0, 1.14)  # of recorded speech
FLATTENING = 0.7  # exponent of word frequencies; below 1 rare words are more frequent than in English
CANDIDATES = 12  # words drawn per position of a sentence
LOG_BASE = 1.0001  # of pocketsphinx's scores

_CLASS = {phone: index + 1 for index, phone in enumerate(PHONES)}  # 0 is the blank of CTC


@dataclass(frozen=True)
class Clip:
    """A clip of speech.

    Attributes:
        wave: int16 (T,) at 16 kHz.
        phones: classes of its phones, uint8 (L,).
        frames: class of each frame of the network, uint8 (F,), 0 in pauses; (0,) if times are not known.
    """

    wave: Tensor
    phones: Tensor
    frames: Tensor


def make_clip(wave: Tensor, phones: Sequence[str], times: Sequence[tuple[str, int, int]] = ()) -> Clip:
    """A clip of a wave (T,) in [-1, 1].

    Args:
        wave: at 16 kHz.
        phones: names.
        times: (phone, first sample, last sample + 1), if known.
    """
    frames = torch.zeros(-(-len(wave) // FRAME) if times else 0, dtype=torch.uint8)
    for phone, start, end in times:
        frames[-(-start // FRAME) : -(-end // FRAME)] = _CLASS[phone]
    classes = torch.tensor([_CLASS[p] for p in phones], dtype=torch.uint8)
    return Clip(_int16(wave), classes, frames)


def _int16(wave: Tensor) -> Tensor:
    return (wave.clamp(-1, 1) * 32767).round().to(torch.int16)


class SentenceGenerator:
    """Random sentences of the words and bigrams of pocketsphinx's English model, without the built-in sentences.

    Each word is one of a few that are drawn by their flattened frequency, chosen by how much more likely it is after
    the word before than alone. No two sentences are alike, so every phone occurs in many contexts.

    Raises:
        UserError: if pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError:
            raise UserError("the words come from the package pocketsphinx: pip install pocketsphinx") from None
        self._model = Decoder(samprate=16000, loglevel="FATAL").get_lm("_default")
        lines = Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        words = sorted(
            {w for w in (line.partition(" ")[0] for line in lines) if re.fullmatch(r"[a-z]{2,}('[a-z]+)?|[ai]", w)}
        )
        scores = np.array([self._model.prob([word]) for word in words], dtype=np.float64)
        known = scores > scores.min()
        self.words = [word for word, is_known in zip(words, known, strict=True) if is_known]
        share = np.exp(FLATTENING * np.log(LOG_BASE) * scores[known])
        self._cumulative = np.cumsum(share / share.sum())
        self._excluded = {text.lower().rstrip(".?!") for text in SENTENCES}

    def sentences(self, count: int, seed: int, min_words: int = 4, max_words: int = 10) -> list[str]:
        """`count` different sentences; they depend on the arguments only."""
        draw = np.random.default_rng(derive(seed, "sentences"))
        texts: dict[str, None] = {}
        while len(texts) < count:
            length = int(draw.integers(min_words, max_words + 1))
            sentence: list[str] = []
            for _ in range(length):
                indices = np.searchsorted(self._cumulative, draw.random(CANDIDATES)).clip(max=len(self.words) - 1)
                sentence.append(self._next(sentence, [self.words[i] for i in indices], float(draw.random())))
            text = " ".join(sentence)
            if text not in self._excluded:
                texts[text] = None
        return list(texts)

    def _next(self, before: list[str], candidates: list[str], chance: float) -> str:
        if not before:
            return candidates[0]
        gain = np.array([self._model.prob([w, before[-1]]) - self._model.prob([w]) for w in candidates])
        likely = np.exp(np.log(LOG_BASE) * (gain - gain.max()))
        return candidates[int(np.searchsorted(np.cumsum(likely / likely.sum()), chance).clip(max=len(candidates) - 1))]


def synthesize_clips(texts: Sequence[str], voices: Sequence[str], seed: int = 0) -> list[Clip]:
    """Speak each text with one of espeak-ng's voices, in turn; texts with foreign words are left out.

    Args:
        texts: to speak.
        voices: names.
        seed: of speed, pitch and intonation.
    """
    clips = []
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
                    spoken = spans(speaker.phoneme_starts)
                except UserError:  # a phoneme that is not one of American English
                    continue
                wave = resample(samples[: spoken[-1][2]], speaker.sample_rate, SAMPLE_RATE)
                factor = SAMPLE_RATE / speaker.sample_rate
                times = [(phone, round(start * factor), round(end * factor)) for phone, start, end in spoken]
                phones = [phone for phone, _ in groupby(phone for phone, _, _ in spoken)]
                clips.append(make_clip(0.3 * wave / wave.abs().max(), phones, times))
    return clips


class Word(NamedTuple):
    """A word, or a pause (text ""), from `start` to `end`, in s."""

    text: str
    start: float
    end: float


class PocketSphinx:
    """pocketsphinx with the English model of its package.

    Raises:
        UserError: if the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise UserError("transcripts with times need the package pocketsphinx: pip install pocketsphinx") from None
        # the transcripts of clear speech are those of the default, 30,000; garbled speech takes half the time
        # (docs/experiments/how-long-does-judging-take.md)
        self._decoder: Any = Decoder(samprate=SAMPLE_RATE, maxhmmpf=3000, loglevel="FATAL")

    def __call__(self, audio: Tensor) -> list[Word]:
        """Words in audio (1, T) at 16 kHz, without gaps; silence and noise are ""."""
        # the decoder adapts to earlier audio; equal audio must always give equal words
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw((audio[0].clamp(-1, 1) * 32767).short().numpy().tobytes(), full_utt=True)
        self._decoder.end_utt()
        return [
            # "<sil>", "[NOISE]" and "++BREATH++" are not words; "the(2)" is the second pronunciation of "the"
            Word(
                "" if s.word[0] in "<[+" else re.sub(r"\(\d+\)$", "", s.word),
                s.start_frame / 100,
                (s.end_frame + 1) / 100,
            )
            for s in self._decoder.seg() or ()
        ]


def transcribe(utterances: Sequence[Utterance], path: Path) -> dict[str, list[Word]]:
    """Words with times by utterance id, from pocketsphinx. `path` (JSON lines) keeps the transcripts."""
    transcripts: dict[str, list[Word]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            transcripts[entry["id"]] = [Word(*word) for word in entry["words"]]
    missing = [u for u in utterances if u.id not in transcripts]
    recognise = PocketSphinx() if missing else None
    for number, u in enumerate(missing, 1):
        assert recognise is not None
        transcripts[u.id] = recognise(load_audio(u, SAMPLE_RATE))
        if number % 10 == 0 or number == len(missing):
            lines = [json.dumps({"id": key, "words": words}) for key, words in transcripts.items()]
            write_text(path, "\n".join(lines) + "\n")
            print(f"transcribed: {number} of {len(missing)}")
    return transcripts


def recorded_clips(utterances: Iterable[Utterance], transcripts: dict[str, list[Word]], seed: int = 0) -> list[Clip]:
    """Clips of recorded speech at three speeds: whole utterances with a text, others cut between transcribed words."""
    clips = []
    for u in utterances:
        wave = load_audio(u, SAMPLE_RATE)[0]
        for speed in SPEEDS:
            changed = resample(wave, round(SAMPLE_RATE * speed), SAMPLE_RATE) if speed != 1 else wave
            if u.text is not None:
                parts: Iterable[tuple[float, float, str]] = [(0.0, u.seconds, u.text)]
            else:
                parts = cut_transcript(transcripts[u.id], np.random.default_rng(derive(seed, u.id, speed, "cuts")))
            for start, end, text in parts:
                if (end - start) / speed > MAX_SECONDS:
                    continue
                try:
                    phones = phones_of(text)
                except UserError:  # a word with a phoneme that is not one of American English
                    continue
                first, last = (round(t / speed * SAMPLE_RATE) for t in (start, end))
                clips.append(make_clip(changed[first:last], phones))
    return clips


def cut_transcript(words: list[Word], draw: np.random.Generator) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of parts of 2 to 6 s that begin at a word; a remainder shorter than 1 s is dropped."""
    texts: list[str] = []
    start, wanted = None, float(draw.uniform(2, 6))
    for word in words:
        if start is None:
            start = word.start
        if texts and word.start - start >= wanted:
            yield start, word.start, " ".join(texts)
            texts, start, wanted = [], word.start, float(draw.uniform(2, 6))
        if word.text:
            texts.append(word.text)
    if texts and start is not None and words[-1].end - start >= 1:
        yield start, words[-1].end, " ".join(texts)


def coded_clips(codec: SNAC, clips: Sequence[Clip], share: float, seed: int = 0) -> list[Clip]:
    """A random share of the clips after the codec; every fourth of them is decoded from its two coarsest levels."""
    draw = np.random.default_rng(derive(seed, "coded"))
    chosen = [clip for clip in clips if draw.random() < share]
    rate, coded = codec.sampling_rate, []
    for number, clip in enumerate(chosen):
        audio = resample(clip.wave.float()[None, None] / 32768, SAMPLE_RATE, rate)
        levels = min(2, codec.n_codebooks) if number % 4 == 3 else None
        with torch.inference_mode():
            output = decode_levels(codec, codec.encode(audio), levels, audio.shape[-1])
        wave = resample(output[0, 0].clone(), rate, SAMPLE_RATE)
        coded.append(Clip(_int16(wave), clip.phones, clip.frames))
    return coded


def save_clips(path: Path, clips: Sequence[Clip]) -> None:
    """Write clips to one safetensors file."""
    tensors = {
        "wave": torch.cat([clip.wave for clip in clips]),
        "samples": torch.tensor([len(clip.wave) for clip in clips]),
        "phones": torch.cat([clip.phones for clip in clips]),
        "count": torch.tensor([len(clip.phones) for clip in clips]),
        "frames": torch.cat([clip.frames for clip in clips]),
        "timed": torch.tensor([len(clip.frames) for clip in clips]),
    }
    write_bytes(path, save(tensors))


def load_clips(path: Path) -> list[Clip]:
    """Read the clips that `save_clips` has written."""
    tensors = load_file(path)
    waves = torch.split(tensors["wave"], tensors["samples"].tolist())
    phones = torch.split(tensors["phones"], tensors["count"].tolist())
    frames = torch.split(tensors["frames"], tensors["timed"].tolist())
    return [Clip(*parts) for parts in zip(waves, phones, frames, strict=True)]


class Batch(NamedTuple):
    """Audio (B, T), phones of all items (sum of L,), their number per item (B,), classes of the frames (B, F)."""

    audio: Tensor
    phones: Tensor
    counts: Tensor
    frames: Tensor


class ClipSampler:
    """Batches of clips of several kinds.

    Args:
        kinds: (share, clips) of each kind; clips of a kind are drawn with equal probability.
    """

    def __init__(self, kinds: Sequence[tuple[float, Sequence[Clip]]]) -> None:
        clips = [(clip, share / len(kind)) for share, kind in kinds for clip in kind]
        clips.sort(key=lambda pair: len(pair[0].wave))
        self.clips = [clip for clip, _ in clips]
        self.samples = torch.tensor([len(clip.wave) for clip in self.clips])
        self._cumulative = torch.tensor([share for _, share in clips], dtype=torch.float64).cumsum(0)

    @property
    def hours(self) -> float:
        """Length of all clips."""
        return float(self.samples.sum()) / SAMPLE_RATE / 3600

    def batch(self, seconds: float, seed: int, step: int) -> Batch:
        """A batch with about `seconds` of speech. It depends on (seed, step) only.

        A random clip sets the length; the others are not longer, and not shorter than 0.6 of it. Each begins at a
        random frame of its row, with silence around it.
        """
        draw = generator(seed, step, "phone pieces")

        def chance() -> float:
            return float(torch.rand((), generator=draw, dtype=torch.float64))

        longest = self._index(chance() * float(self._cumulative[-1]))
        most = int(self.samples[longest])
        shortest = int(torch.searchsorted(self.samples, int(0.6 * most)))
        low = float(self._cumulative[shortest - 1]) if shortest else 0.0
        high = float(self._cumulative[longest])
        width = (most // 4800 + 2) * 4800  # whole frames, and a fast size for the FFT
        count = max(2, round(seconds * SAMPLE_RATE / width))
        chosen = [
            self.clips[longest],
            *(self.clips[self._index(low + chance() * (high - low))] for _ in range(count - 1)),
        ]
        audio = torch.zeros(count, width)
        frames = torch.zeros(count, width // FRAME + 1, dtype=torch.long)
        for row, classes, clip in zip(audio, frames, chosen, strict=True):
            start = int(chance() * ((width - len(clip.wave)) // FRAME + 1))
            row[start * FRAME : start * FRAME + len(clip.wave)] = clip.wave.float() / 32768
            if len(clip.frames):
                classes[start : start + len(clip.frames)] = clip.frames.long()
            else:
                classes[:] = UNKNOWN
        counts = torch.tensor([len(clip.phones) for clip in chosen])
        return Batch(audio, torch.cat([clip.phones for clip in chosen]).long(), counts, frames)

    def _index(self, cumulative: float) -> int:
        return min(int(torch.searchsorted(self._cumulative, cumulative, right=True)), len(self.clips) - 1)
