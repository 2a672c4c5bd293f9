"""Synthetic speakers: parallel, repeatable, audible, and never the same voices on both sides."""

from __future__ import annotations

import builtins
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snac_core.errors import UserError
from snac_runner.data.audio import load_audio
from snac_runner.data.espeak import variants, voice
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.pairs import conversion_pairs
from snac_runner.data.synth import HELD_OUT, MAX_VOICES, MIN_VOICES, SENTENCES, TRAIN, choose_voices, synthesize


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synth") / "speakers", speakers=8, sentences=4)


@pytest.mark.parametrize(
    ("speakers", "sizes"), [(8, (4, 2, 2)), (24, (12, 4, 8)), (32, (16, 6, 10)), (80, (64, 6, 10))]
)
def test_voices_are_shared_out_as_promised(speakers: int, sizes: tuple[int, int, int]) -> None:
    chosen = choose_voices(speakers)
    assert tuple(len(chosen[split]) for split in ("train", "dev", "test")) == sizes


def test_without_dev_all_held_out_voices_are_test_voices() -> None:
    chosen = choose_voices(40, 3, dev=False)
    assert set(chosen) == {"train", "test"}
    assert sorted(chosen["test"]) == sorted(HELD_OUT)
    assert chosen["train"] == choose_voices(40, 3)["train"]


def test_held_out_voices_are_never_in_train_and_no_voice_changes_sides() -> None:
    assert len(HELD_OUT) == 16
    assert not set(HELD_OUT) & set(TRAIN)
    for seed in range(3):
        home: dict[str, str] = {}
        for speakers in range(MIN_VOICES, MAX_VOICES + 1):
            for split, voices in choose_voices(speakers, seed).items():
                assert set(voices) <= set(TRAIN if split == "train" else HELD_OUT)
                assert all(home.setdefault(name, split) == split for name in voices)


def test_every_voice_of_the_list_speaks_and_none_is_another() -> None:
    assert set(HELD_OUT + TRAIN) <= set(variants())
    spectra = {}
    for name in HELD_OUT + TRAIN:
        with voice(name) as speaker:
            samples = speaker.say(SENTENCES[0])
        assert 1.5 < len(samples) / speaker.sample_rate < 6, name
        assert np.sqrt(np.mean(samples**2)) > 0.01, name
        # the long-term spectrum in 1/3 octaves: what a voice is, apart from what it says
        power = np.abs(np.fft.rfft(samples, 131072)) ** 2
        edges = np.geomspace(60, 8000, 30) / speaker.sample_rate * 131072
        spectra[name] = np.log([power[int(a) : int(b) + 1].sum() for a, b in pairwise(edges)])
        spectra[name] -= spectra[name].mean()
    names = sorted(spectra)
    apart = [np.abs(spectra[a] - spectra[b]).mean() for i, a in enumerate(names) for b in names[:i]]
    assert min(apart) > 0.05


def test_equal_arguments_make_equal_files(synthetic: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "again", speakers=8, sentences=4)
    files = {path.relative_to(synthetic): path.read_bytes() for path in synthetic.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert len([path for path in files if path.suffix == ".flac"]) == 32


def test_breathy_voices_repeat_too_whatever_was_said_before() -> None:
    def samples_of(name: str) -> bytes:
        with voice(name, 3) as speaker:
            return bytes(speaker.say("A loud bang."))

    alone = {name: samples_of(name) for name in ("Reed", "caleb", "f5", "Alicia", "victor")}
    assert {name: samples_of(name) for name in reversed(alone)} == alone


def test_a_voice_says_the_same_in_a_larger_corpus(synthetic: Path, tmp_path: Path) -> None:
    larger = synthesize(tmp_path / "more", speakers=10, sentences=4)
    for path in synthetic.rglob("*.flac"):
        assert (larger / path.relative_to(synthetic)).read_bytes() == path.read_bytes()


def test_the_corpus_is_parallel_with_text_and_split_by_voice(synthetic: Path) -> None:
    corpus = open_corpus(synthetic)
    assert corpus.skipped == ()
    assert {split: len(corpus.speakers(split)) for split in corpus.splits} == {"train": 4, "dev": 2, "test": 2}
    texts = Counter(u.text for us in corpus.splits.values() for u in us)
    assert set(texts.values()) == {8}
    assert set(texts) <= set(SENTENCES)
    pairs = conversion_pairs(corpus, "test", n=2, seed=0).pairs
    assert all(p.parallel and corpus.utterance(p.parallel.utterance).text == p.text for p in pairs)
    assert "8 synthetic speakers" in (synthetic / "README.md").read_text()


def test_every_utterance_is_as_loud_and_fits_into_a_conversion(synthetic: Path) -> None:
    for us in open_corpus(synthetic).splits.values():
        for u in us:
            assert u.seconds < 4
            assert u.sample_rate == 16000
            audio = load_audio(u, 16000)
            assert float(audio.square().mean().sqrt()) == pytest.approx(0.06, rel=0.02) or float(audio.max()) > 0.9


def test_there_is_much_to_say_and_nothing_twice() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) >= 40


def test_held_out_sentences_are_said_by_no_voice_of_train_and_by_all_others(tmp_path: Path) -> None:
    corpus = open_corpus(synthesize(tmp_path / "apart", speakers=8, sentences=5, held_out=2))
    said = {split: Counter(u.text for u in corpus.split(split)) for split in corpus.splits}
    assert [len(said[split]) for split in ("train", "dev", "test")] == [3, 2, 2]
    assert set(said["dev"]) == set(said["test"])
    assert not set(said["train"]) & set(said["test"])
    assert all(set(counts.values()) == {len(corpus.speakers(split))} for split, counts in said.items())
    assert "different ones in train than in dev and test" in (tmp_path / "apart" / "README.md").read_text()
    with pytest.raises(UserError, match="made with other arguments"):
        synthesize(tmp_path / "apart", speakers=8, sentences=5)


def test_own_sentences_can_be_spoken(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "own", speakers=8, sentences=["This is my own sentence."])
    assert {u.text for us in open_corpus(root).splits.values() for u in us} == {"This is my own sentence."}


def test_the_same_folder_is_made_once_and_another_is_not_overwritten(synthetic: Path) -> None:
    calls: list[Any] = []
    synthesize(synthetic, speakers=8, sentences=4, progress=lambda *a: calls.append(a))
    assert calls == []
    with pytest.raises(UserError, match="holds other files, or speakers made with other arguments"):
        synthesize(synthetic, speakers=9, sentences=4)
    with pytest.raises(UserError, match="is a file"):
        synthesize(synthetic / "README.md")


def test_an_interrupted_synthesis_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "speakers", speakers=8, sentences=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"speakers": 7}, "got 7 synthetic speakers; expected 8 to 80"),
        ({"speakers": 81}, "8 to 80"),
        ({"sentences": 0}, "expected 1 to 48"),
        ({"sentences": ["a", " a"]}, "sentences contains a text twice"),
        ({"sentences": []}, "sentences is empty"),
        ({"sentences": 3, "held_out": 3}, "held_out is 3 of 3 sentences; expected 0 to 2"),
        ({"speakers": 8, "sentences": ["..."]}, "synthesized no speech for"),
    ],
)
def test_what_cannot_be_spoken_is_an_error(tmp_path: Path, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        synthesize(tmp_path / "x", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package espeakng-loader"):
        synthesize(tmp_path / "x")
