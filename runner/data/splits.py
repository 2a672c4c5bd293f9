"""Which speaker goes into which split: by a hash of the name, so that a new speaker moves nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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
