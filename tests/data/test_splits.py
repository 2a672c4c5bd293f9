"""The split by speaker: disjoint, repeatable, and stable when speakers come."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core.errors import UserError
from snac_runner.data.corpus import DEV_SHARE, MIN_SPEAKERS, TEST_SHARE, check_disjoint, hash_fraction, split_speakers

names = st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=40)


@settings(deadline=None)
@given(names, st.integers(0, 10))
def test_every_speaker_is_in_one_split_and_train_keeps_two(speakers: set[str], seed: int) -> None:
    chosen = split_speakers(speakers, seed=seed)
    counts = Counter(chosen.values())
    assert set(chosen) == speakers
    assert counts["train"] >= MIN_SPEAKERS
    assert all(counts[s] == 0 or counts[s] >= MIN_SPEAKERS for s in ("dev", "test"))
    assert len(speakers) < 6 or min(counts["dev"], counts["test"]) >= MIN_SPEAKERS


@settings(deadline=None)
@given(names, names, st.integers(0, 10))
def test_a_new_speaker_moves_nobody_once_dev_and_test_are_filled_by_themselves(
    speakers: set[str], more: set[str], seed: int
) -> None:
    places = [hash_fraction(s, seed) for s in speakers]
    full = (
        sum(p < TEST_SHARE for p in places) >= MIN_SPEAKERS
        and sum(TEST_SHARE <= p < TEST_SHARE + DEV_SHARE for p in places) >= MIN_SPEAKERS
        and sum(p >= TEST_SHARE + DEV_SHARE for p in places) >= MIN_SPEAKERS
    )
    if full:
        before, after = split_speakers(speakers, seed=seed), split_speakers(speakers | more, seed=seed)
        assert {s: after[s] for s in speakers} == before


def test_shares_are_kept_in_a_large_corpus() -> None:
    counts = Counter(split_speakers(f"speaker{i}" for i in range(2000)).values())
    assert counts["test"] == pytest.approx(400, abs=60)
    assert counts["dev"] == pytest.approx(200, abs=45)


def test_a_share_of_zero_leaves_a_split_empty() -> None:
    assert set(split_speakers("abcdefghij", dev=0.0).values()) == {"train", "test"}
    assert set(split_speakers("abcdefghij", dev=0.0, test=0.0).values()) == {"train"}


def test_the_split_is_the_same_in_every_version() -> None:
    assert split_speakers("abcdefgh", seed=0) == {
        "a": "train", "b": "train", "c": "test", "d": "train", "e": "test", "f": "dev", "g": "train", "h": "dev"
    }  # fmt: skip


def test_speakers_on_two_sides_are_named() -> None:
    with pytest.raises(UserError, match=r"here: speakers in more than one split: 'b' \(dev and train\)"):
        check_disjoint({"train": ["a", "b"], "dev": ["b"], "test": ["c"]}, "here")
