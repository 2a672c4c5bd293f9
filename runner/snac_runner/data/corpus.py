"""What a corpus is: utterances of speakers, in three splits that share no speaker.

Which speaker goes into which split: by a hash of the name, so that a new speaker moves nobody."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from snac_core.errors import UserError, nearest

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Utterance:
    """One stretch of speech by one speaker.

    Attributes:
        id: its name within the corpus: the path below the root without suffix, e.g. "dev/367/367-130732-0002".
        path: the audio file.
        speaker: the speaker's name.
        seconds: how long the stretch is, in s.
        sample_rate: of the file, in Hz.
        start: where in the file the stretch begins, in s.
        text: what is said, where known.
        sex: "F" or "M", where known.
        digest: sha256 of the bytes of the file.
    """

    id: str
    path: Path
    speaker: str
    seconds: float
    sample_rate: int
    start: float = 0.0
    text: str | None = None
    sex: str | None = None
    digest: str = ""


class Segment(NamedTuple):
    """A part of an utterance: its id, where the part begins (s from the utterance's beginning), and its length in s."""

    utterance: str
    start: float
    seconds: float

    def overlaps(self, other: Segment) -> bool:
        """Whether the two share any time of the same utterance."""
        return (
            self.utterance == other.utterance
            and self.start < other.start + other.seconds
            and other.start < self.start + self.seconds
        )


@dataclass(frozen=True)
class Corpus:
    """Utterances in splits "train", "dev" and "test" that share no speaker.

    Attributes:
        root: the folder (or the manifest's folder).
        name: the folder's name.
        splits: utterances of each split, sorted by id; a split may be empty.
        skipped: (path, reason) of each file that is not used.
        notes: what a reader of results should know about this data, one sentence each.
    """

    root: Path
    name: str
    splits: dict[str, tuple[Utterance, ...]]
    skipped: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise UserError(f"unknown split {unknown[0]!r} in {self.root}{nearest(unknown[0], SPLITS)}")
        check_disjoint({name: (u.speaker for u in part) for name, part in self.splits.items()}, str(self.root))

    @cached_property
    def digest(self) -> str:
        """sha256 over what is said by whom in which split; where the folder lies does not matter."""
        return digest_of(
            [
                [split, u.id, u.speaker, u.digest, round(u.start, 4), round(u.seconds, 4), u.text, u.sex]
                for split in SPLITS
                for u in self.splits.get(split, ())
            ]
        )

    @cached_property
    def _by_id(self) -> dict[str, Utterance]:
        return {u.id: u for part in self.splits.values() for u in part}

    @cached_property
    def _by_speaker(self) -> dict[str, tuple[Utterance, ...]]:
        found: dict[str, list[Utterance]] = {}
        for part in self.splits.values():
            for u in part:
                found.setdefault(u.speaker, []).append(u)
        return {speaker: tuple(us) for speaker, us in found.items()}

    def split(self, name: str) -> tuple[Utterance, ...]:
        """The utterances of a split, sorted by id.

        Raises:
            UserError: if there is no such split, or nothing in it.
        """
        if name not in SPLITS:
            raise UserError(f"unknown split {name!r}{nearest(name, SPLITS)}")
        if not self.splits.get(name):
            filled = ", ".join(f"{s} ({len(p)} utterances)" for s, p in self.splits.items() if p) or "none"
            raise UserError(f"the {name} split of {self.root} is empty; splits with speech: {filled}")
        return self.splits[name]

    def speakers(self, split: str) -> list[str]:
        """The names of the split's speakers, sorted; empty if the split is."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
        return sorted({u.speaker for u in self.splits.get(split, ())})

    def utterance(self, id: str) -> Utterance:
        """The utterance of this id."""
        if id not in self._by_id:
            raise UserError(f"no utterance {id!r} in {self.root}{nearest(id, list(self._by_id)[:1000])}")
        return self._by_id[id]

    def of_speaker(self, speaker: str) -> tuple[Utterance, ...]:
        """All utterances of a speaker, sorted by id."""
        if speaker not in self._by_speaker:
            raise UserError(f"no speaker {speaker!r} in {self.root}{nearest(speaker, self._by_speaker)}")
        return self._by_speaker[speaker]

    def sex(self, speaker: str) -> str | None:
        """ "F", "M", or None where it is not known."""
        return self.of_speaker(speaker)[0].sex


def digest_of(value: Any) -> str:
    """sha256, in hex, of a value's canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(speakers: dict[str, Iterable[str]], where: str) -> None:
    """Check that no speaker is in two splits: results on a speaker heard in training say nothing about new ones.

    Raises:
        UserError: naming the speakers that are in more than one split.
    """
    homes: dict[str, set[str]] = {}
    for split, names in speakers.items():
        for speaker in names:
            homes.setdefault(speaker, set()).add(split)
    both = {speaker: sorted(splits) for speaker, splits in sorted(homes.items()) if len(splits) > 1}
    if both:
        listed = ", ".join(f"{speaker!r} ({' and '.join(splits)})" for speaker, splits in list(both.items())[:5])
        more = f" and {len(both) - 5} more" if len(both) > 5 else ""
        raise UserError(f"{where}: speakers in more than one split: {listed}{more}; each may be in one only")


TEST_SHARE = 0.2
DEV_SHARE = 0.1
LEAST = 2  # speakers in dev and in test: a conversion needs a source and another target


def position(speaker: str, seed: int) -> float:
    """Where a speaker falls in [0, 1), by the name and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{speaker}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_speakers(
    speakers: Iterable[str], *, seed: int = 0, dev: float = DEV_SHARE, test: float = TEST_SHARE
) -> dict[str, str]:
    """Speaker -> "train", "dev" or "test".

    A speaker is in test if its position is below `test`, in dev if it is below `test + dev`, else in train. So adding
    speakers moves no other, as long as dev and test have two speakers by themselves. Where they have not (a small
    corpus), those next by position fill them up to two, but train keeps at least two: of 4 or 5 speakers test gets two
    or three and dev none; 2 or 3 speakers are all in train.
    A share of 0 leaves that split empty.
    """
    order = sorted(set(speakers), key=lambda s: (position(s, seed), s))
    tests = [s for s in order if position(s, seed) < test]
    others = 2 * LEAST if dev > 0 and len(order) >= 3 * LEAST else LEAST  # speakers that dev and train need
    tests = _filled(tests, order, len(order) - others) if test > 0 else []
    rest = [s for s in order if s not in set(tests)]
    devs = [s for s in rest if position(s, seed) < test + dev]
    devs = _filled(devs, rest, len(rest) - LEAST) if dev > 0 else []
    chosen = dict.fromkeys(order, "train") | dict.fromkeys(tests, "test") | dict.fromkeys(devs, "dev")
    return {s: chosen[s] for s in sorted(chosen)}


def _filled(part: list[str], order: list[str], room: int) -> list[str]:
    """The first of `order`, at least LEAST of them and no more than `room`; none if LEAST do not fit."""
    if room < LEAST:
        return []
    return order[: min(max(len(part), LEAST), room)]
