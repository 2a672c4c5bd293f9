"""Batches that other processes prepare are those that the loader makes, whatever happens to the processes."""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from snac_core.errors import UserError
from snac_runner.data.corpus import Corpus
from snac_runner.data.crops import Batch, CropLoader
from snac_runner.data.loading import PrefetchingLoader
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.utterances import store


@pytest.fixture
def corpus(speech: Callable[..., Path]) -> Corpus:
    return open_corpus(speech({"a": 2, "b": 2, "c": 1}, seconds=1.5), dev=0.0, test=0.0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_processes_does_not_change_the_batches(corpus: Corpus, workers: int) -> None:
    plain = CropLoader(corpus, "train", 16000, 0.3, 4, 0)
    prefetched = PrefetchingLoader(CropLoader(corpus, "train", 16000, 0.3, 4, 0), 9, workers)
    state = torch.get_rng_state()
    try:
        for step in (1, 2, 3, 6, 7, 2, 9):
            expected, found = plain.at(step), prefetched.at(step)
            assert torch.equal(expected.audio, found.audio)
            assert (expected.utterances, expected.starts) == (found.utterances, found.starts)
    finally:
        prefetched.close()
    assert torch.equal(torch.get_rng_state(), state), "torch's own random numbers are not used"


def test_parts_of_batches_are_prepared_in_order(corpus: Corpus) -> None:
    plain, parts = CropLoader(corpus, "train", 16000, 0.3, 4, 0), [slice(0, 1), slice(1, 4)]
    prefetched = PrefetchingLoader(CropLoader(corpus, "train", 16000, 0.3, 4, 0), 9, 2, parts)
    try:
        for step in (1, 2, 5):
            for rows in parts:
                assert torch.equal(prefetched.at(step, rows).audio, plain.at(step).audio[rows])
    finally:
        prefetched.close()


class Dying:
    """Kills the process that prepares step 3: the first time, or each time."""

    steps_per_epoch = 1

    def __init__(self, corpus: Corpus, marker: Path, always: bool) -> None:
        self.loader = CropLoader(corpus, "train", 16000, 0.3, 2, 0)
        self.marker, self.always = marker, always

    def at(self, step: int) -> Batch:
        if step == 3 and (self.always or not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.loader.at(step)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_is_killed_is_started_again_once(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    plain = CropLoader(corpus, "train", 16000, 0.3, 2, 0)
    prefetched = PrefetchingLoader(Dying(corpus, tmp_path / "killed", always=False), 6, workers)
    try:
        with caplog.at_level(logging.WARNING):
            for step in range(6):
                assert torch.equal(prefetched.at(step).audio, plain.at(step).audio)
    finally:
        prefetched.close()
    assert [record.message for record in caplog.records] == [
        "a process that reads audio was killed; it is started again"
    ]


def test_processes_that_are_killed_again_end_the_run_with_a_sentence(corpus: Corpus, tmp_path: Path) -> None:
    prefetched = PrefetchingLoader(Dying(corpus, tmp_path / "killed", always=True), 6, 1)

    def read() -> None:
        for step in range(6):
            prefetched.at(step)

    with pytest.raises(UserError, match=r"killed, and again after a new start, before step \d was read; run the same"):
        read()


def test_a_process_maps_the_file_of_the_corpus_and_refuses_another(corpus: Corpus, tmp_path: Path) -> None:
    part = corpus.split("train")
    assert part.file is not None
    assert len(pickle.dumps(part)) < 1000, "not its columns"
    again = pickle.loads(pickle.dumps(part))
    assert list(again) == list(part)
    store(part.file.path, corpus.parts, {"digest": "of other speech"})
    with pytest.raises(UserError, match="was scanned again by another command"):
        pickle.loads(pickle.dumps(part))
