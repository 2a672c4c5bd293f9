"""Targets and negatives: never the wrong speaker, and the same draw for the same (seed, step)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core import UserError
from snac_core.speakers.sampling import NEAR_DUPLICATE, SpeakerSampler, SpeakerTable


def table(speakers: int, seed: int = 0, duplicates: tuple[tuple[int, int], ...] = ()) -> SpeakerTable:
    """Random unit vectors; each pair of `duplicates` gets the same one."""
    numbers = torch.Generator().manual_seed(seed)
    reference = torch.nn.functional.normalize(torch.randn(speakers, 24, generator=numbers), dim=1)
    for one, other in duplicates:
        reference[other] = reference[one]
    return SpeakerTable(tuple(f"s{row:03d}" for row in range(speakers)), reference.clone(), reference, "digest")


counts = st.integers(1, 5)
seeds = st.integers(0, 2**40)


@settings(max_examples=40, deadline=None)
@given(speakers=st.integers(2, 12), rows=st.integers(1, 9), count=counts, seed=seeds, step=st.integers(0, 10**6))
def test_a_target_is_never_the_anchor_and_a_speaker_of_the_table(
    speakers: int, rows: int, count: int, seed: int, step: int
) -> None:
    sampler = SpeakerSampler(table(speakers), seed)
    anchors = torch.arange(rows) % speakers
    targets = sampler.targets(anchors, step, count)
    assert targets.shape == (count * rows,)
    assert bool((targets != anchors.repeat(count)).all())
    assert 0 <= int(targets.min()) <= int(targets.max()) < speakers
    assert torch.equal(targets, SpeakerSampler(table(speakers), seed).targets(anchors, step, count))


@settings(max_examples=40, deadline=None)
@given(speakers=st.integers(2, 9), rows=st.integers(1, 7), count=counts, seed=seeds, twin=st.booleans())
def test_a_negative_is_neither_anchor_nor_target_nor_a_near_duplicate_of_them(
    speakers: int, rows: int, count: int, seed: int, twin: bool
) -> None:
    voices = table(speakers, seed % 1000, duplicates=((0, 1),) if twin else ())
    sampler = SpeakerSampler(voices, seed)
    anchors = torch.arange(rows) % speakers
    targets = sampler.targets(anchors, 3, 1)
    negatives = sampler.negatives(anchors, targets, 3, count)
    assert negatives.shape == (rows, count)
    similarity = voices.reference @ voices.reference.T
    for anchor, target, drawn in zip(anchors.tolist(), targets.tolist(), negatives.tolist(), strict=True):
        apart = similarity[[anchor, target]].amax(0) < NEAR_DUPLICATE
        legal = {s for s in range(speakers) if s not in (anchor, target) and apart[s]}
        assert set(drawn) <= legal if legal else set(drawn) == {-1}, "every output gets all its negatives, or none"
    assert torch.equal(negatives, sampler.negatives(anchors, targets, 3, count))


def test_targets_are_drawn_uniformly_over_all_other_speakers() -> None:
    sampler = SpeakerSampler(table(5), seed=0)
    drawn = sampler.targets(torch.zeros(1000, dtype=torch.long), 1, 4)
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    assert shares[0] == 0
    assert bool(((shares[1:] - 0.25).abs() < 0.03).all())


def test_seeds_steps_and_purposes_draw_different_speakers() -> None:
    anchors = torch.arange(50) % 20
    draws = [SpeakerSampler(table(20), seed).targets(anchors, step, 1).tolist() for seed in (0, 1) for step in (1, 2)]
    assert len({tuple(draw) for draw in draws}) == 4


def test_drawing_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    sampler = SpeakerSampler(table(5), 0)
    sampler.negatives(torch.arange(5), sampler.targets(torch.arange(5), 1, 1), 1, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_draw_of_an_item_does_not_depend_on_the_step_before() -> None:
    sampler, fresh = SpeakerSampler(table(9), 4), SpeakerSampler(table(9), 4)
    for step in range(5):
        sampler.targets(torch.arange(9), step, 2)
    assert torch.equal(sampler.targets(torch.arange(9), 5, 2), fresh.targets(torch.arange(9), 5, 2))


def test_one_speaker_is_not_enough() -> None:
    with pytest.raises(UserError, match="at least 2 training speakers; got 1"):
        SpeakerSampler(table(1), 0)


def test_a_speaker_without_embedding_suggests_the_nearest() -> None:
    assert table(3).indices(["s002", "s000"]).tolist() == [2, 0]
    with pytest.raises(UserError, match="no embedding of speaker 's02'; did you mean 's002'"):
        table(3).indices(["s02"])
