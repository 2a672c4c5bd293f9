"""The voices an encoder is trained on: every speaker at several speeds, as recorded and through a codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from runner.data.audio import load_audio, resample
from runner.data.corpus import Corpus
from snac_core.seeding import derive, generator

CHUNK = 2.0  # s; what goes through the codec is cut into pieces of this length, which makes a batch


@dataclass
class Voices:
    """Classes of the training, one per speaker and speed: played faster or slower a speaker is another one.

    Attributes:
        sample_rate: in Hz.
        names: of each class.
        clean: for each class its utterances, int16 (T,).
        coded: the same utterances through the codec; empty where none was given.
        share: how often each class is drawn, adding up to 1.
    """

    sample_rate: int
    names: list[str] = field(default_factory=list)
    clean: list[list[Tensor]] = field(default_factory=list)
    coded: list[list[Tensor]] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def batch(self, size: int, samples: int, seed: int, step: int, *, coded: float = 0.4) -> tuple[Tensor, Tensor]:
        """Crops (B, samples) of random classes and their labels (B,): a pure function of (seed, step).

        Utterances shorter than the crop are repeated. A share `coded` of the items is heard through the codec.
        """
        draw = generator(seed, step, "encoder crops")
        label = torch.multinomial(torch.tensor(self.share), size, replacement=True, generator=draw)
        place = torch.rand(size, 3, generator=draw).tolist()
        crops = []
        for index, (which, where, how) in zip(label.tolist(), place, strict=True):
            source = self.coded if how < coded and self.coded else self.clean
            utterances = source[index]
            wave = utterances[int(which * len(utterances))]
            if len(wave) < samples:
                wave = wave.repeat(-(-samples // len(wave)))
            start = int(where * (len(wave) - samples + 1))
            crops.append(wave[start : start + samples])
        return torch.stack(crops).float() / 32768, label


def gather_voices(
    corpora: Sequence[tuple[Corpus, float]],
    sample_rate: int,
    *,
    speeds: Iterable[float] = (0.88, 1.0, 1.14),
    codec: nn.Module | None = None,
    codec_rate: int | None = None,
    most_seconds: float = 40.0,
    coded_seconds: float = 8.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Voices:
    """Load the train speakers of every corpus.

    Args:
        corpora: each with how often it is drawn, relative to the others.
        sample_rate: wanted, in Hz.
        speeds: factors of speed (and with it of pitch and formants).
        codec: a frozen codec that gives (audio_hat, codes) for audio (B, 1, T); None: no resynthesis.
        codec_rate: the codec's sample rate in Hz, where it has none itself.
        most_seconds: of speech kept per class, in s; what comes after is left out.
        coded_seconds: of each class that go through the codec, in s; it is the slowest part of this.
        seed: of the codec's noise.
        progress: called with (classes done, of how many).
    """
    voices = Voices(sample_rate)
    total = sum(weight for _, weight in corpora)
    speeds = tuple(speeds)
    todo = sum(len(corpus.speakers("train")) for corpus, _ in corpora) * len(speeds)
    for corpus, weight in corpora:
        speakers = corpus.speakers("train")
        for speaker in speakers:
            spoken = [load_audio(u, sample_rate)[0] for u in corpus.of_speaker(speaker)]
            for speed in speeds:
                waves = _within(
                    [resample(w, round(sample_rate * speed), sample_rate) for w in spoken], most_seconds * sample_rate
                )
                voices.names.append(f"{corpus.name}/{speaker}@{speed:g}")
                voices.clean.append([_int16(w) for w in waves])
                voices.share.append(weight / total / len(speakers) / len(speeds))
                if codec is not None:
                    rate = codec_rate or cast(int, codec.sampling_rate)
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(derive(seed, voices.names[-1], "codec noise"))
                        some = _within(waves, coded_seconds * sample_rate)
                        some[0] = some[0][: int(coded_seconds * sample_rate)]
                        voices.coded.append([_int16(_through(codec, w, sample_rate, rate)) for w in some])
                if progress is not None:
                    progress(len(voices.names), todo)
    return voices


def _within(waves: list[Tensor], samples: float) -> list[Tensor]:
    kept: list[Tensor] = []
    for wave in waves:
        if kept and sum(map(len, kept)) + len(wave) > samples:
            break
        kept.append(wave)
    return kept


def _through(codec: nn.Module, wave: Tensor, sample_rate: int, codec_rate: int) -> Tensor:
    """A wave (T,) at `sample_rate` after the codec, in pieces of `CHUNK` seconds, (T',)."""
    resampled = resample(wave, sample_rate, codec_rate)
    samples = int(CHUNK * codec_rate)
    padded = nn.functional.pad(resampled, (0, -len(resampled) % samples))
    with torch.no_grad():
        coded: Tensor = codec(padded.view(-1, 1, samples))[0]
    return resample(coded.flatten()[: len(resampled)], codec_rate, sample_rate)


def _int16(wave: Tensor) -> Tensor:
    return (wave.clamp(-1, 1) * 32767).round().to(torch.int16)
