"""A corpus: utterances of speakers in train, dev and test splits that share no speaker.

Speakers are assigned to splits by a hash of their name, so that adding a speaker does not move any other.
"""

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
    """One utterance: a file, or a segment of a file, with speech of one speaker.

    Attributes:
        id: unique within the corpus: the path below the root without suffix, e.g. "dev/367/367-130732-0002".
        path: the audio file.
        speaker: the speaker's name.
        seconds: length, in s.
        sample_rate: of the file, in Hz.
        start: where the utterance begins in the file, in s.
        text: the transcript, if known.
        sex: "F" or "M", if known.
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
    """A segment of an utterance: the utterance's id, the start (in s from the utterance's start), the length in s."""

    utterance: str
    start: float
    seconds: float

    def overlaps(self, other: Segment) -> bool:
        """Whether both segments contain a common part of the same utterance."""
        return (
            self.utterance == other.utterance
            and self.start < other.start + other.seconds
            and other.start < self.start + self.seconds
        )


@dataclass(frozen=True)
class Corpus:
    """Utterances in the splits "train", "dev" and "test", which share no speaker.

    Attributes:
        root: the folder (or the manifest's folder).
        name: the folder's name.
        splits: utterances of each split, sorted by id; a split may be empty.
        skipped: (path, reason) of each file that is not used.
        notes: facts about this data that matter for reading results, one sentence each.

    Raises:
        UserError: for an unknown split, or a speaker in more than one split.
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
        """sha256 over splits, utterances, speakers and audio. It does not depend on the folder's path."""
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
        by_speaker: dict[str, list[Utterance]] = {}
        for part in self.splits.values():
            for u in part:
                by_speaker.setdefault(u.speaker, []).append(u)
        return {speaker: tuple(us) for speaker, us in by_speaker.items()}

    def split(self, name: str) -> tuple[Utterance, ...]:
        """The utterances of a split, sorted by id.

        Raises:
            UserError: if the split does not exist or is empty.
        """
        if name not in SPLITS:
            raise UserError(f"unknown split {name!r}{nearest(name, SPLITS)}")
        if not self.splits.get(name):
            filled = ", ".join(f"{s} ({len(p)} utterances)" for s, p in self.splits.items() if p) or "none"
            raise UserError(f"the {name} split of {self.root} is empty; splits with speech: {filled}")
        return self.splits[name]

    def speakers(self, split: str) -> list[str]:
        """The names of the split's speakers, sorted; an empty list for an empty split."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
        return sorted({u.speaker for u in self.splits.get(split, ())})

    def utterance(self, id: str) -> Utterance:
        """The utterance with this id."""
        if id not in self._by_id:
            raise UserError(f"no utterance {id!r} in {self.root}{nearest(id, list(self._by_id)[:1000])}")
        return self._by_id[id]

    def of_speaker(self, speaker: str) -> tuple[Utterance, ...]:
        """All utterances of a speaker, sorted by id."""
        if speaker not in self._by_speaker:
            raise UserError(f"no speaker {speaker!r} in {self.root}{nearest(speaker, self._by_speaker)}")
        return self._by_speaker[speaker]

    def sex(self, speaker: str) -> str | None:
        """ "F", "M", or None if it is not known."""
        return self.of_speaker(speaker)[0].sex


def digest_of(value: Any) -> str:
    """sha256, in hex, of a value's canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(speakers: dict[str, Iterable[str]], where: str) -> None:
    """Check that no speaker is in two splits: results on training speakers do not predict results on new speakers.

    Args:
        speakers: split -> names of its speakers.
        where: the corpus, for the error message.

    Raises:
        UserError: naming the speakers that are in more than one split.
    """
    splits_of: dict[str, set[str]] = {}
    for split, names in speakers.items():
        for speaker in names:
            splits_of.setdefault(speaker, set()).add(split)
    shared = {speaker: sorted(splits) for speaker, splits in sorted(splits_of.items()) if len(splits) > 1}
    if shared:
        listed = ", ".join(f"{speaker!r} ({' and '.join(splits)})" for speaker, splits in list(shared.items())[:5])
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise UserError(f"{where}: speakers in more than one split: {listed}{more}; each may be in one only")


TEST_SHARE = 0.2
DEV_SHARE = 0.1
MIN_SPEAKERS = 2  # in dev and in test: a conversion needs a source speaker and a target speaker


def hash_fraction(name: str, seed: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the name and the seed."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_speakers(
    speakers: Iterable[str], *, seed: int = 0, dev: float = DEV_SHARE, test: float = TEST_SHARE
) -> dict[str, str]:
    """Assign each speaker to "train", "dev" or "test".

    A speaker is in test if the hash fraction of its name is below `test`, in dev if it is below `test + dev`, else in
    train. Adding speakers therefore does not move any other, as long as dev and test have two speakers each. In a
    smaller corpus, the next speakers in the order of the hash fill them up to two, but train keeps at least two: of 4
    or 5 speakers, test gets two or three and dev none; 2 or 3 speakers are all in train.

    Args:
        speakers: names; duplicates are ignored.
        seed: of the hash.
        dev: fraction of the speakers for dev; 0 leaves dev empty.
        test: fraction of the speakers for test; 0 leaves test empty.

    Returns:
        Speaker -> split, sorted by speaker.
    """
    order = sorted(set(speakers), key=lambda s: (hash_fraction(s, seed), s))
    reserved = 2 * MIN_SPEAKERS if dev > 0 and len(order) >= 3 * MIN_SPEAKERS else MIN_SPEAKERS  # for dev and train
    below = sum(hash_fraction(s, seed) < test for s in order)
    tests = order[: _split_size(below, len(order) - reserved)] if test > 0 else []
    rest = order[len(tests) :]
    below = sum(hash_fraction(s, seed) < test + dev for s in rest)
    devs = rest[: _split_size(below, len(rest) - MIN_SPEAKERS)] if dev > 0 else []
    splits = dict.fromkeys(order, "train") | dict.fromkeys(tests, "test") | dict.fromkeys(devs, "dev")
    return {s: splits[s] for s in sorted(splits)}


def _split_size(wanted: int, available: int) -> int:
    """How many speakers a split gets: at least MIN_SPEAKERS and at most `available`; 0 if these contradict."""
    return 0 if available < MIN_SPEAKERS else min(max(wanted, MIN_SPEAKERS), available)
