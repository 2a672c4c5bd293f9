"""What the phone recogniser is trained on: stretches of speech with their phones, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from runner.phones.alphabet import PHONES
from runner.phones.network import FRAME, SAMPLE_RATE
from snac_core import atomic
from snac_core.seeding import generator

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
    atomic.write_bytes(path, save(table))


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
