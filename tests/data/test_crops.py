"""Batches are a pure function of (seed, step), of different speakers, and avoid pauses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_runner.data.corpus import Corpus
from snac_runner.data.crops import CropLoader, draw_start
from snac_runner.data.open_corpus import open_corpus

Speech = Callable[..., Path]


@pytest.fixture
def corpus(speech: Speech) -> Corpus:
    speech({"a": 1, "b": 2, "c": 3, "d": 1}, below="train", seconds=1.5)
    return open_corpus(speech({"e": 2}, below="dev", seconds=0.6), test=0.0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    step=st.integers(0, 10**6), seed=st.integers(0, 99), batch=st.integers(1, 6), seconds=st.sampled_from([0.3, 2.0])
)
def test_a_batch_depends_on_seed_and_step_alone(
    corpus: Corpus, step: int, seed: int, batch: int, seconds: float
) -> None:
    loader = CropLoader(corpus, "train", 16000, seconds, batch, seed)
    first = loader.at(step)
    loader.at(step + 1)
    again = loader.at(step)
    fresh = CropLoader(corpus, "train", 16000, seconds, batch, seed).at(step)
    for other in (again, fresh):
        assert torch.equal(first.audio, other.audio)
        assert (first.speakers, first.utterances, first.starts) == (other.speakers, other.utterances, other.starts)
    assert first.audio.shape == (batch, 1, round(seconds * 16000))
    assert first.audio.dtype == torch.float32
    assert max(Counter(first.speakers).values()) == -(-batch // 4)  # each of the four once before any comes again
    assert [corpus.utterance(u).speaker for u in first.utterances] == first.speakers


def test_other_seeds_and_steps_give_other_batches(corpus: Corpus) -> None:
    batches = [CropLoader(corpus, "train", 16000, 0.3, 4, seed).at(step) for seed in (0, 1) for step in (0, 1)]
    assert all(not torch.equal(a.audio, b.audio) for i, a in enumerate(batches) for b in batches[:i])


def test_short_utterances_are_followed_by_zeros_and_the_gain_is_untouched(corpus: Corpus) -> None:
    batch = CropLoader(corpus, "dev", 16000, 1.0, 2, 0).at(0)
    assert batch.lengths == [9600, 9600]
    assert not batch.audio[..., 9600:].any()
    assert float(batch.audio.abs().max()) == pytest.approx(0.2, abs=1e-3)


def test_speakers_come_equally_often_and_utterances_by_length(speech: Speech) -> None:
    speech({"long": 1}, below="train/both", seconds=3.0)
    speech({"short": 1}, below="train/both", seconds=1.0)
    loader = CropLoader(open_corpus(speech({"other": 1}, below="train"), dev=0.0, test=0.0), "train", 16000, 0.5, 1, 0)
    drawn = Counter(loader.at(step).utterances[0].split("/")[2] for step in range(600))
    assert drawn["other_0.wav" if "other_0.wav" in drawn else "other_0"] == pytest.approx(300, abs=45)
    assert drawn["long"] / drawn["short"] == pytest.approx(3, abs=1)


def test_pauses_are_drawn_again(tmp_path: Path) -> None:
    audio = torch.zeros(1, 16000)
    audio[:, 12000:] = torch.randn(1, 4000)
    silent = sum(
        not bool(audio[:, s : s + 1000].any())
        for s in (draw_start(audio, 1000, generator(trial)) for trial in range(200))
    )
    assert silent < 30  # (12/15)^8 of 200 are 34; drawn once it would be 147
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        samples = np.random.default_rng(ord(speaker)).normal(size=16000) * 0.1
        samples[:8000] = 0
        soundfile.write(tmp_path / speaker / "x.wav", samples, 16000)
    loader = CropLoader(open_corpus(tmp_path, dev=0.0, test=0.0), "train", 16000, 0.25, 2, 0)
    levels = [float(loader.at(step).audio[row].square().mean()) for step in range(30) for row in range(2)]
    assert np.mean([level < 1e-6 for level in levels]) < 0.05


def test_an_epoch_is_as_many_steps_as_show_each_utterance_once_on_average(corpus: Corpus) -> None:
    assert CropLoader(corpus, "train", 16000, 0.3, 2, 0).steps_per_epoch == 4


def test_an_empty_split_or_a_wrong_number_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="batch_size 0"):
        CropLoader(corpus, "train", 16000, 0.3, 0, 0)
    with pytest.raises(UserError, match="did you mean 'train'"):
        CropLoader(corpus, "training", 16000, 0.3, 2, 0)
    with pytest.raises(UserError, match=r"the test split of .* is empty; splits with speech: train \(7"):
        CropLoader(corpus, "test", 16000, 0.3, 2, 0)
