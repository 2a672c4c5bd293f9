"""A corpus: utterances of speakers in train, dev and test splits that share no speaker.

Speakers are assigned to splits by a hash of their name, so that adding a speaker does not move any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from snac_core.errors import UserError, nearest
from snac_runner.data.utterances import Segment, Utterance, Utterances

__all__ = ["SPLITS", "Corpus", "Segment", "Utterance", "Utterances"]

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Corpus:
    """Utterances in the splits "train", "dev" and "test", which share no speaker.

    Attributes:
        root: the folder (or the manifest's folder).
        name: the folder's name.
        splits: utterances of each split, sorted by id; a split may be empty.
        skipped: (path, reason) of each file that is not used.
        notes: facts about this data that matter for reading results, one sentence each.
        stored_digest: `digest`, if it is known from before.

    Raises:
        UserError: for an unknown split, or a speaker in more than one split.
    """

    root: Path
    name: str
    splits: Mapping[str, Sequence[Utterance]]
    skipped: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = field(default=())
    stored_digest: str = ""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise UserError(f"unknown split {unknown[0]!r} in {self.root}{nearest(unknown[0], SPLITS)}")
        check_disjoint({name: part.speakers for name, part in self.parts.items()}, str(self.root))

    @cached_property
    def parts(self) -> dict[str, Utterances]:
        """The splits, all three, with their columns."""
        return {
            name: part
            if isinstance(part := self.splits.get(name, ()), Utterances)
            else Utterances.of(sorted(part, key=lambda u: u.id), self.root)
            for name in SPLITS
        }

    @cached_property
    def digest(self) -> str:
        """sha256 over splits, utterances, speakers and audio. It does not depend on the folder's path."""
        if self.stored_digest:
            return self.stored_digest
        digest, separator = hashlib.sha256(b"["), b""
        for split in SPLITS:
            for u in self.parts[split]:
                row = [split, u.id, u.speaker, u.digest, round(u.start, 4), round(u.seconds, 4), u.text, u.sex]
                digest.update(separator + _canonical(row))
                separator = b","
        digest.update(b"]")
        return digest.hexdigest()

    def split(self, name: str) -> Utterances:
        """The utterances of a split, sorted by id.

        Raises:
            UserError: if the split does not exist or is empty.
        """
        if name not in SPLITS:
            raise UserError(f"unknown split {name!r}{nearest(name, SPLITS)}")
        if not len(self.parts[name]):
            filled = ", ".join(f"{s} ({len(p)} utterances)" for s, p in self.parts.items() if len(p)) or "none"
            raise UserError(f"the {name} split of {self.root} is empty; splits with speech: {filled}")
        return self.parts[name]

    def speakers(self, split: str) -> list[str]:
        """The names of the split's speakers, sorted; an empty list for an empty split."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
        return list(self.parts[split].speakers)

    def utterance(self, id: str) -> Utterance:
        """The utterance with this id."""
        for part in self.parts.values():
            if found := part.find(id):
                return found
        some = [known for part in self.parts.values() for known in islice(part.ids(), 1000)]
        raise UserError(f"no utterance {id!r} in {self.root}{nearest(id, some)}")

    def of_speaker(self, speaker: str) -> tuple[Utterance, ...]:
        """All utterances of a speaker, sorted by id."""
        for part in self.parts.values():
            if len(rows := part.rows_of(speaker)):
                return tuple(part[row] for row in rows.tolist())
        raise UserError(f"no speaker {speaker!r} in {self.root}{nearest(speaker, self._names)}")

    def sex(self, speaker: str) -> str | None:
        """ "F", "M", or None if it is not known."""
        for part in self.parts.values():
            if len(rows := part.rows_of(speaker)):
                return part[int(rows[0])].sex
        raise UserError(f"no speaker {speaker!r} in {self.root}{nearest(speaker, self._names)}")

    @property
    def _names(self) -> list[str]:
        return [name for part in self.parts.values() for name in part.speakers]


def _canonical(value: Any) -> bytes:
    """A value's canonical JSON (sorted keys, no spaces, UTF-8)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256, in hex, of a value's canonical JSON (sorted keys, no spaces, UTF-8)."""
    return hashlib.sha256(_canonical(value)).hexdigest()


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
