"""Stratified and in-batch choices: who may be drawn, in which shares, and what happens where nobody may."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from snac_core.errors import UserError
from snac_core.speakers.sampling import NEAR_DUPLICATE, SpeakerSampler, SpeakerTable, Strata, draw_distinct, draw_strata

seeds = st.integers(0, 2**40)


def table(speakers: int, seed: int = 0, dim: int = 5, twins: bool = False) -> SpeakerTable:
    """Random unit vectors of few dimensions, so that all strata occur; with `twins`, speakers 0 and 1 are one."""
    vectors = torch.randn(speakers, dim, generator=torch.Generator().manual_seed(seed % 2**31))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    if twins:
        vectors[1] = vectors[0]
    return SpeakerTable(tuple(f"s{row:03d}" for row in range(speakers)), vectors.clone(), vectors, "digest")


def at_cosines(*cosines: float) -> SpeakerTable:
    """Speaker 0, and others at these cosines to it."""
    rows = [torch.tensor([1.0, 0.0]), *(torch.tensor([c, (1 - c * c) ** 0.5]) for c in cosines)]
    vectors = torch.stack(rows)
    return SpeakerTable(tuple(f"s{row}" for row in range(len(rows))), vectors, vectors, "digest")


def stratum(cosine: Tensor, strata: Strata) -> Tensor:
    return (cosine >= strata.threshold_easy_medium).long() + (cosine >= strata.threshold_medium_hard).long()


@given(count=st.integers(1, 40), easy=st.floats(0, 1), medium=st.floats(0, 1))
def test_shares_add_up_and_stay_within_one_of_their_ratio(count: int, easy: float, medium: float) -> None:
    medium *= 1 - easy
    strata = Strata(ratio_easy=easy, ratio_medium=medium, ratio_hard=max(0.0, 1 - easy - medium))
    quota = strata.quota(count)
    assert sum(quota) == count
    for got, ratio in zip(quota, (strata.ratio_easy, strata.ratio_medium, strata.ratio_hard), strict=True):
        assert abs(got - ratio * count) <= 1 + 1e-6


def test_the_original_settings_are_the_defaults() -> None:
    strata = Strata()
    assert (strata.ratio_easy, strata.ratio_medium, strata.ratio_hard) == (0.3, 0.4, 0.3)
    assert (strata.threshold_easy_medium, strata.threshold_medium_hard) == (0.3, 0.6)
    assert strata.same_speaker_threshold == 0.85
    assert strata.quota(10) == (3, 4, 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ratio_easy": 0.9}, "add up to 1.6; expected 1"),
        ({"threshold_easy_medium": 0.7}, "threshold_easy_medium < threshold_medium_hard"),
        ({"same_speaker_threshold": 0.5}, "< same_speaker_threshold"),
        ({"ratio_esy": 0.3}, "Extra inputs are not permitted"),
    ],
)
def test_inconsistent_shares_and_limits_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Strata(**values)


@settings(max_examples=60, deadline=None)
@given(
    speakers=st.integers(3, 40),
    rows=st.integers(1, 9),
    count=st.integers(1, 11),
    seed=seeds,
    step=st.integers(0, 10**6),
    twins=st.booleans(),
    choice=st.sampled_from(["random", "in_batch", "stratified"]),
)
def test_no_choice_ever_draws_anchor_target_or_a_near_duplicate(
    speakers: int, rows: int, count: int, seed: int, step: int, twins: bool, choice: str
) -> None:
    voices = table(speakers, seed, twins=twins)
    sampler = SpeakerSampler(voices, seed)
    anchors = torch.arange(rows) % speakers
    targets = sampler.targets(anchors, step, 1)
    negatives = sampler.negatives(anchors, targets, step, count, choice=choice)  # type: ignore[arg-type]
    assert negatives.shape == (rows, count)
    similarity = voices.reference @ voices.reference.T
    batch = set(anchors.tolist()) | set(targets.tolist())
    for anchor, target, drawn in zip(anchors.tolist(), targets.tolist(), negatives.tolist(), strict=True):
        apart = similarity[[anchor, target]].amax(0) < NEAR_DUPLICATE
        legal = {s for s in range(speakers) if s not in (anchor, target) and apart[s]}
        if choice == "in_batch":
            legal &= batch
            assert len([s for s in drawn if s >= 0]) == min(count, len(legal)), "each once, and no one else"
            assert set(drawn) - {-1} <= legal
        else:
            assert set(drawn) <= legal if legal else set(drawn) == {-1}
    again = SpeakerSampler(voices, seed).negatives(anchors, targets, step, count, choice=choice)  # type: ignore[arg-type]
    assert torch.equal(negatives, again), "a function of seed and step"


@settings(max_examples=40, deadline=None)
@given(
    speakers=st.integers(2, 30),
    rows=st.integers(1, 9),
    count=st.integers(1, 6),
    seed=seeds,
    twins=st.booleans(),
    choice=st.sampled_from(["random", "in_batch", "stratified"]),
)
def test_a_target_is_another_speaker_and_no_near_duplicate_where_there_is_anybody_else(
    speakers: int, rows: int, count: int, seed: int, twins: bool, choice: str
) -> None:
    voices = table(speakers, seed, twins=twins)
    anchors = torch.arange(rows) % speakers
    targets = SpeakerSampler(voices, seed).targets(anchors, 5, count, choice=choice)  # type: ignore[arg-type]
    assert targets.shape == (count * rows,)
    own = anchors.repeat(count)
    assert bool((targets != own).all())
    similarity = voices.reference @ voices.reference.T
    for anchor, target in zip(own.tolist(), targets.tolist(), strict=True):
        somebody = sum(float(c) < NEAR_DUPLICATE for c in similarity[anchor]) >= speakers // 2
        assert not somebody or similarity[anchor, target] < NEAR_DUPLICATE


def test_the_strata_are_drawn_in_their_shares() -> None:
    voices, strata = table(400, dim=6), Strata()
    anchors, targets = torch.arange(50), torch.arange(50, 100)
    rows = SpeakerSampler(voices, 0).negatives(anchors, targets, 1, 10, choice="stratified")
    cosine = (voices.reference[targets].unsqueeze(1) * voices.reference[rows]).sum(-1)
    assert stratum(cosine, strata).tolist() == [[0] * 3 + [1] * 4 + [2] * 3] * 50
    assert all(len(set(row)) == 10 for row in rows.tolist()), "there are enough: none comes twice"


@pytest.mark.parametrize(
    ("cosines", "said", "expected"),
    [
        ((0.0, 0.4, 0.5), ["no hard ones for some speakers: medium ones are drawn instead"], [0, 1, 1]),
        ((0.4, 0.5, 0.7), ["no easy ones for some speakers: medium ones are drawn instead"], [1, 1, 2]),
        ((0.0, 0.1, 0.7), ["no medium ones for some speakers: hard ones are drawn instead"], [0, 2, 2]),
        ((0.65, 0.7, 0.75), ["no easy ones for some speakers: hard ones are drawn instead",
                             "no medium ones for some speakers: hard ones are drawn instead"], [2, 2, 2]),
    ],
)  # fmt: skip
def test_an_empty_stratum_is_replaced_by_the_nearest_and_said_so(
    cosines: tuple[float, ...], said: list[str], expected: list[int]
) -> None:
    voices = at_cosines(-0.9, *cosines)
    sampler = SpeakerSampler(voices, 0)
    # Speaker 1, at -0.9, is the source; the negatives are drawn by their cosine to the target, speaker 0.
    rows = sampler.negatives(torch.tensor([1]), torch.tensor([0]), 1, 3, choice="stratified")[0]
    got = stratum(voices.reference[rows] @ voices.reference[0], Strata())
    assert got.tolist() == expected
    assert sampler.notes == said


def test_speakers_without_a_legal_negative_get_none_and_it_is_said() -> None:
    sampler = SpeakerSampler(at_cosines(0.9, 0.95), 0)
    rows = sampler.negatives(torch.tensor([1]), torch.tensor([0]), 1, 4, choice="stratified")
    assert rows.tolist() == [[-1] * 4]
    assert sampler.notes == ["some speakers have no legal stratified negative"]


def test_more_than_there_are_come_again_only_after_all_have_come() -> None:
    members = torch.tensor([[True, False, True, True, False], [False] * 5])
    keys = torch.rand(members.shape)
    drawn = draw_distinct(members, 7, keys)
    assert sorted(drawn[0, :3].tolist()) == [0, 2, 3]
    assert torch.equal(drawn[0, 3:6], drawn[0, :3])
    assert drawn[1].eq(-1).all()
    once = draw_distinct(members, 7, keys, again=False)
    assert once[0, 3:].eq(-1).all()


@pytest.mark.parametrize("candidates", [3, 4, 7, 8, 14, 21])
def test_strata_that_are_one_draw_different_speakers(candidates: int) -> None:
    alike, legal = torch.full((50, candidates), 0.5), torch.ones(50, candidates, dtype=torch.bool)
    rows = draw_strata(alike, legal, 3, Strata(), torch.Generator().manual_seed(0), lambda _: None)
    repeated = sum(len(set(row.tolist())) < 3 for row in rows)
    assert repeated < 50, "not all of them"


def test_an_unknown_choice_suggests_the_nearest() -> None:
    sampler = SpeakerSampler(table(5), 0)
    with pytest.raises(UserError, match="unknown choice 'stratifed'; did you mean 'stratified'"):
        sampler.negatives(torch.tensor([0]), torch.tensor([1]), 1, 1, choice="stratifed")  # type: ignore[arg-type]
