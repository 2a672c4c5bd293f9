"""Stratified choices from the utterances of a bank: what may be drawn is what comparing all utterances allows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import arrays, sampler_of, table_of, written
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core.errors import UserError
from snac_core.speakers.bank import Bank, open_bank
from snac_core.speakers.index import NEAREST, BankPool, build_index, open_index
from snac_core.speakers.sampling import SpeakerSampler, Strata

SPEAKERS, EACH = 60, 8


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """48 training speakers in few dimensions, so that all strata occur; speakers 0 and 1 are one voice."""
    parts = arrays(SPEAKERS, EACH, dim=5)
    parts["reference"][1] = parts["reference"][0]
    parts["embeddings"][EACH : 2 * EACH] = parts["embeddings"][:EACH]
    return written(tmp_path_factory.mktemp("bank"), parts)


@pytest.fixture(scope="module")
def sampler(bank: Bank) -> SpeakerSampler:
    return sampler_of(bank)


def legal_by_brute_force(bank: Bank, anchor: int, target: int, strata: Strata) -> dict[int, tuple[int, float]]:
    """Row of each training utterance that may be a negative: its speaker, and its cosine to the target."""
    first, last = bank.header.splits["train"]
    found = {}
    for row in range(first, last):
        speaker = int(bank.labels[row])
        cosines = [
            float(np.dot(voice.astype(np.float64), bank.reference[of].astype(np.float64)))
            for voice in (bank.embeddings[row], bank.reference[speaker])
            for of in (target, anchor)
        ]
        if speaker not in (anchor, target) and max(cosines) < strata.same_speaker_threshold:
            found[row] = speaker, cosines[0]
    return found


def stratum(cosine: float, strata: Strata) -> int:
    return int(cosine >= strata.threshold_easy_medium) + int(cosine >= strata.threshold_medium_hard)


@settings(max_examples=25, deadline=None)
@given(
    anchor=st.integers(0, 47),
    distance=st.integers(1, 47),
    count=st.integers(1, 12),
    step=st.integers(0, 10**6),
    limits=st.tuples(st.floats(-0.5, 0.3), st.floats(0.35, 0.6), st.floats(0.65, 0.99)),
)
def test_negatives_are_those_that_comparing_all_utterances_allows(
    bank: Bank, sampler: SpeakerSampler, anchor: int, distance: int, count: int, step: int, limits: tuple[float, ...]
) -> None:
    target = (anchor + distance) % 48
    names = ("threshold_easy_medium", "threshold_medium_hard", "same_speaker_threshold")
    strata = Strata(**dict(zip(names, limits, strict=True)))
    drawn = sampler.negative_embeddings(
        torch.tensor([anchor]), torch.tensor([target]), step, count, choice="stratified", strata=strata
    )
    legal = legal_by_brute_force(bank, anchor, target, strata)
    rows, speakers = drawn.rows[0].tolist(), drawn.speakers[0].tolist()
    assert set(rows) <= set(legal) if legal else set(rows) == {-1}
    if not legal:
        return
    for row, speaker, embedding in zip(rows, speakers, drawn.embeddings[0], strict=True):
        assert speaker == legal[row][0] == int(bank.labels[row])
        assert np.array_equal(embedding.numpy(), bank.embeddings[row])
    there = [[row for row, (_, cosine) in legal.items() if stratum(cosine, strata) == s] for s in range(3)]
    got = [stratum(legal[row][1], strata) for row in rows]
    wanted = strata.quota(count)
    if all(there):
        assert [got.count(s) for s in range(3)] == list(wanted)
    for s in range(3):
        mine = [row for row, of in zip(rows, got, strict=True) if of == s]
        assert len(set(mine)) == min(len(mine), len(there[s])) or not all(there), "none twice while there are others"
    again = SpeakerSampler(sampler.table, sampler.seed, lambda: sampler.stratified_pool)
    assert torch.equal(
        drawn.speakers,
        again.negatives(torch.tensor([anchor]), torch.tensor([target]), step, count, choice="stratified",
                        strata=strata),
    )  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(anchors=st.lists(st.integers(0, 47), min_size=1, max_size=9), count=st.integers(1, 4), step=st.integers(0, 999))
def test_stratified_targets_are_speakers_of_utterances_in_the_strata(
    bank: Bank, sampler: SpeakerSampler, anchors: list[int], count: int, step: int
) -> None:
    targets = sampler.targets(torch.tensor(anchors), step, count, choice="stratified")
    assert targets.shape == (count * len(anchors),)
    references = table_of(bank).reference
    for place, target in enumerate(targets.tolist()):
        anchor = anchors[place % len(anchors)]
        assert target != anchor
        assert float(references[target] @ references[anchor]) < Strata().same_speaker_threshold
        utterances = torch.from_numpy(np.array(bank.embeddings[bank.labels == target])) @ references[anchor]
        quota = Strata().quota(count)
        wanted = [s for s in range(3) for _ in range(quota[s])][place // len(anchors)]
        assert wanted in [stratum(float(cosine), Strata()) for cosine in utterances]


def test_two_labels_of_one_voice_are_never_each_others_negatives(sampler: SpeakerSampler) -> None:
    for step in range(20):
        drawn = sampler.negatives(torch.tensor([7]), torch.tensor([0]), step, 12, choice="stratified")
        assert 1 not in drawn


def test_hard_ones_are_found_by_the_index_where_random_rows_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snac_core.speakers.index.RANDOM", 4)
    bank = written(tmp_path, arrays(400, 4, dim=16))
    sampler, references = sampler_of(bank), bank.reference
    cosines = bank.embeddings[:1280] @ references[:320].T
    hard = (cosines >= 0.6) & (cosines < 0.85) & (np.asarray(bank.labels[:1280])[:, None] != np.arange(320))
    targets = torch.from_numpy(np.flatnonzero(hard.sum(0) >= 3)[:30])
    drawn = sampler.negative_embeddings(targets * 0 + 319, targets, 1, 10, choice="stratified")
    found = torch.einsum("mks,ms->mk", drawn.embeddings, torch.from_numpy(np.array(references))[targets])
    assert float((found[:, -3:] >= 0.6).float().mean()) > 0.9


def test_one_search_serves_a_whole_batch_and_asks_for_more_than_the_own_utterances(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(bank)[0]
    searches = []
    search = index.search
    monkeypatch.setattr(index, "search", lambda queries, k: searches.append((len(queries), k)) or search(queries, k))
    pool = BankPool(bank, index, table_of(bank))
    anchors = torch.arange(0, 20)
    SpeakerSampler(table_of(bank), 0, lambda: pool).negatives(anchors, anchors + 5, 1, 6, choice="stratified")
    assert searches == [(20, NEAREST + EACH)]


def test_other_choices_draw_from_the_speakers_and_ask_for_no_utterances(bank: Bank) -> None:
    def none() -> BankPool:
        raise AssertionError("not needed")

    sampler, plain = SpeakerSampler(table_of(bank), 0, none), SpeakerSampler(table_of(bank), 0)
    anchors = torch.arange(6)
    targets = sampler.targets(anchors, 1, 2)
    assert torch.equal(targets, plain.targets(anchors, 1, 2))
    for choice in ("random", "in_batch"):
        drawn = sampler.negative_embeddings(anchors, targets[:6], 1, 3, choice=choice)  # type: ignore[arg-type]
        assert torch.equal(drawn.rows, drawn.speakers)
        assert torch.equal(drawn.embeddings, sampler.table.vectors(drawn.rows.clamp(min=0)))


def test_a_bank_of_other_speakers_or_another_encoder_is_refused(bank: Bank) -> None:
    index, table = build_index(bank)[0], table_of(bank)
    with pytest.raises(UserError, match="embeddings of another encoder"):
        BankPool(bank, index, replace(table, encoder="another"))
    with pytest.raises(UserError, match=r"has 48 training speakers, and the data has others \(47\)"):
        BankPool(bank, index, replace(table, names=table.names[1:]))


DRAWS = """
import sys
import faiss, torch
from banks import table_of
from snac_core.speakers.bank import open_bank
from snac_core.speakers.index import BankPool, open_index
from snac_core.speakers.sampling import SpeakerSampler

torch.set_num_threads(int(sys.argv[2]))
faiss.omp_set_num_threads(int(sys.argv[2]))
bank = open_bank(sys.argv[1])
table = table_of(bank)
sampler = SpeakerSampler(table, 3, lambda: BankPool(bank, open_index(bank), table))
anchors = torch.arange(40)
for step in (5, 6):
    targets = sampler.targets(anchors, step, 1, choice="stratified")
    print(targets.tolist(), sampler.negative_embeddings(anchors, targets, step, 6, choice="stratified").rows.tolist())
"""


def test_processes_with_other_numbers_of_threads_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an index of cells and codes, which is memory-mapped."""
    monkeypatch.setattr("snac_core.speakers.index.FLAT_UP_TO", 1000)
    bank = written(tmp_path, arrays(200, 10, dim=16))
    assert build_index(bank)[0].header.kind.startswith("IVF")
    draws = [
        subprocess.run(
            [sys.executable, "-c", DRAWS, str(tmp_path), threads], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent,
        ).stdout
        for threads in ("1", "2")
    ]  # fmt: skip
    assert draws[0] == draws[1]
    assert draws[0].count("[") > 40


def test_an_index_is_mapped_and_finds_what_the_built_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snac_core.speakers.index.FLAT_UP_TO", 1000)
    bank = written(tmp_path, arrays(200, 10, dim=16))
    built = build_index(bank)[0]
    queries = torch.from_numpy(np.array(bank.reference[:20]))
    opened = open_index(open_bank(tmp_path), gpu=0)
    assert opened.search_kind == built.header.kind, "faiss-cpu has no GPU"
    for one, other in zip(built.search(queries, 40), opened.search(queries, 40), strict=True):
        assert torch.equal(one, other)
