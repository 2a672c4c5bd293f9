"""Speech with known phones: espeak-ng's own, recorded speech, and both as a codec gives them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch

from runner.data.audio import load_audio, resample
from runner.data.corpus import Utterance
from runner.data.espeak import voice
from runner.phones.alphabet import phones_of, spans
from runner.phones.material import Piece, piece
from runner.phones.network import SAMPLE_RATE
from runner.phones.readings import Reading
from runner.pretrain.figures import decode_coarse
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.seeding import derive

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
                    said = spans(speaker.begun)
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
            heard = decode_coarse(codec, codec.encode(audio), levels, audio.shape[-1])
        wave = resample(heard[0, 0].clone(), rate, SAMPLE_RATE)
        coded.append(Piece((wave.clamp(-1, 1) * 32767).round().to(torch.int16), p.phones, p.frames))
        if progress:
            progress(number + 1, len(chosen))
    return coded
