"""References do not overlap; conversions are balanced, fixed, hashed, and survive export."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core.errors import UserError
from snac_runner.data.corpus import Corpus, Segment, Utterance
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.pairs import PairList, conversion_pairs
from snac_runner.data.references import POSITIVES, References


def made_up(counts: list[int], seconds: float = 3.0, texts: bool = False, sexes: str = "") -> Corpus:
    """A corpus without files: `counts` utterances by s0, s1, ... in test, none longer than a source may be."""
    utterances = [
        Utterance(
            id=f"s{speaker:02d}/{n}",
            path=Path(f"/nowhere/s{speaker:02d}/{n}.wav"),
            speaker=f"s{speaker:02d}",
            seconds=seconds + 0.1 * n,
            sample_rate=16000,
            text=f"Sentence {n}." if texts else None,
            sex=sexes[speaker % len(sexes)] if sexes else None,
            digest=f"{speaker}-{n}",
        )
        for speaker, count in enumerate(counts)
        for n in range(count)
    ]
    return Corpus(Path("/nowhere"), "nowhere", {"train": (), "dev": (), "test": tuple(utterances)})


def _within(part: Segment, whole: Segment) -> bool:
    ends = whole.start - 1e-9 <= part.start and part.start + part.seconds <= whole.start + whole.seconds + 1e-9
    return part.utterance == whole.utterance and ends


def clash(parts: list[Segment], others: list[Segment]) -> bool:
    return any(a.overlaps(b) for a in parts for b in others)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.floats(0.5, 100), st.booleans())
def test_scoring_parts_overlap_neither_conditioning_nor_sources(counts: list[int], seconds: float, texts: bool) -> None:
    corpus = made_up(counts, seconds, texts)
    references = References(corpus, "test")
    for speaker, count in zip(references.speakers, counts, strict=True):
        conditioning, scoring = references.conditioning(speaker), references.scoring(speaker)
        source = references.source(speaker)
        assert conditioning
        assert scoring
        assert source
        assert not clash(scoring, conditioning)
        assert not clash(scoring, source)
        assert not clash(scoring, [references.ceiling(speaker), references.ceiling(speaker, 0.3)])
        assert count < 3 or not clash(conditioning, source)
        parts = references.positives(speaker)
        assert len(parts) == POSITIVES
        assert all(any(_within(part, whole) for whole in scoring) for part in parts)
        for part in (*conditioning, *scoring, *source, *parts):
            assert part.start >= 0
            assert part.start + part.seconds <= corpus.utterance(part.utterance).seconds + 1e-9
            assert part.seconds > 0.2


def test_one_utterance_gives_two_halves_and_a_note() -> None:
    references = References(made_up([1, 1], 8.0), "test")
    assert references.conditioning("s00") == [Segment("s00/0", 0.0, 4.0)]
    assert references.scoring("s00") == [Segment("s00/0", 4.0, 4.0)]
    assert references.ceiling("s00", 2.5) == Segment("s00/0", 0.0, 2.5)
    assert any("2 of 2 speakers have one utterance" in note for note in references.notes)
    assert References(made_up([3, 3]), "test").notes == ()


def test_long_references_are_capped() -> None:
    references = References(made_up([20, 1], 20.0), "test", conditioning_seconds=30, scoring_seconds=45)
    assert len(references.conditioning("s00")) == 1
    assert len(references.scoring("s00")) == 2
    assert references.conditioning("s01") == [Segment("s01/0", 0.0, 10.0)]
    with pytest.raises(UserError, match="must be above 0"):
        References(made_up([1, 1]), "test", scoring_seconds=0)


def test_a_sentence_has_the_same_role_in_all_voices() -> None:
    corpus = made_up([12, 12, 12], texts=True)
    references = References(corpus, "test")
    roles = [{s.utterance.split("/")[1] for s in references.source(speaker)} for speaker in references.speakers]
    assert roles[0] == roles[1] == roles[2]


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 6), min_size=2, max_size=9),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 50),
    sexes=st.sampled_from(["", "F", "FM", "FFM"]),
)
def test_everyone_is_source_and_target_equally_often_and_never_of_themselves(
    counts: list[int], share: float, seed: int, sexes: str
) -> None:
    corpus = made_up(counts, sexes=sexes)
    n = max(1, round(share * len(counts) * (len(counts) - 1)))
    pairs = conversion_pairs(corpus, "test", n=n, seed=seed).pairs
    assert len({p.id for p in pairs}) == n
    assert len({(p.source_speaker, p.target) for p in pairs}) == n  # none twice before all have come
    for names in ([p.target for p in pairs], [p.source_speaker for p in pairs]):
        times = [Counter(names)[f"s{i:02d}"] for i in range(len(counts))]
        assert max(times) - min(times) <= 1
    references = References(corpus, "test")
    for p in pairs:
        assert p.target != p.source_speaker
        assert corpus.utterance(p.source.utterance).speaker == p.source_speaker
        assert p.source.seconds <= 4.0
        assert not clash([p.source], references.scoring(p.source_speaker))
        assert (p.same_sex is None) == (not sexes)
        assert p.same_sex is None or p.same_sex == (corpus.sex(p.source_speaker) == corpus.sex(p.target))


def test_same_sex_and_cross_sex_pairs_are_about_equal_in_number() -> None:
    pairs = conversion_pairs(made_up([2] * 10, sexes="FM"), "test", n=20, seed=1).pairs
    assert abs(sum(bool(p.same_sex) for p in pairs) - 10) <= 2


def test_a_parallel_corpus_knows_text_and_true_target() -> None:
    corpus = made_up([9] * 4, texts=True)
    references = References(corpus, "test")
    for p in conversion_pairs(corpus, "test", n=12, seed=0).pairs:
        assert p.text == corpus.utterance(p.source.utterance).text
        assert p.parallel is not None
        true = corpus.utterance(p.parallel.utterance)
        assert (true.speaker, true.text) == (p.target, p.text)
        assert not clash([p.parallel], references.conditioning(p.target) + references.scoring(p.target))


def test_equal_arguments_give_equal_digests_and_others_do_not() -> None:
    corpus = made_up([3] * 5)
    digest = conversion_pairs(corpus, "test", n=10, seed=0).digest
    assert conversion_pairs(corpus, "test", n=10, seed=0).digest == digest
    assert conversion_pairs(corpus, "test", n=10, seed=1).digest != digest
    assert conversion_pairs(corpus, "test", n=9, seed=0).digest != digest
    assert conversion_pairs(made_up([3, 3, 3, 3, 4]), "test", n=10, seed=0).digest != digest


def test_an_exported_list_comes_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    corpus = made_up([4] * 4, texts=True, sexes="FM")
    pairs = conversion_pairs(corpus, "test", n=8, seed=0)
    pairs.export(tmp_path / "pairs.json")
    again = PairList.load(tmp_path / "pairs.json")
    assert again == pairs
    assert again.digest == pairs.digest
    again.check(corpus)
    stored = json.loads((tmp_path / "pairs.json").read_text())
    assert stored["files"]["s00/0"] == {"path": "s00/0.wav", "start": 0.0}
    stored["pairs"][0]["target"] = stored["pairs"][1]["target"]
    (tmp_path / "changed.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="was changed after it was exported"):
        PairList.load(tmp_path / "changed.json")
    (tmp_path / "other.json").write_text('{"pairs": 3}')
    with pytest.raises(UserError, match="is not a list of pairs"):
        PairList.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="no list of pairs"):
        PairList.load(tmp_path / "none.json")


def test_another_corpus_under_the_same_names_is_refused() -> None:
    corpus = made_up([2, 2])
    pairs = conversion_pairs(corpus, "test", n=2, seed=0)
    other = tuple(Utterance(**{**vars(u), "digest": "x"}) for u in corpus.splits["test"])
    with pytest.raises(UserError, match="is not the audio that the list of pairs names"):
        pairs.check(Corpus(corpus.root, "other", {"test": other}))
    later = tuple(Utterance(**{**vars(u), "start": 1.0}) for u in corpus.splits["test"])
    moved = Corpus(corpus.root, "other", {"train": (), "dev": (), "test": later})
    with pytest.raises(UserError, match="is not the audio that the list of pairs names"):
        pairs.check(moved)
    assert conversion_pairs(moved, "test", n=2, seed=0).digest != pairs.digest


def test_more_conversions_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match="has only 2 different conversions"):
        conversion_pairs(made_up([1, 1]), "test", n=50, seed=0)
    with pytest.raises(UserError, match="one speaker, 's00'; conversion needs two"):
        conversion_pairs(made_up([5]), "test", n=2, seed=0)
    with pytest.raises(UserError, match="must be above 0"):
        conversion_pairs(made_up([2, 2]), "test", n=0, seed=0)


def test_real_speech_gives_the_same_hundred_conversions_each_time(librispeech_mini: Path) -> None:
    corpus = open_corpus(librispeech_mini)
    pairs = conversion_pairs(corpus, "test", n=100, seed=0)
    assert pairs.digest == conversion_pairs(corpus, "test", n=100, seed=0).digest
    assert set(Counter(p.target for p in pairs.pairs).values()) == {2, 3}
    assert Counter(p.same_sex for p in pairs.pairs)[True] == pytest.approx(50, abs=5)
    assert all(p.source.seconds == 4.0 for p in pairs.pairs)
    references = References(corpus, "test")
    assert not any(clash([p.source], references.scoring(p.source_speaker)) for p in pairs.pairs)
