"""Batches depend on the step only, contain the requested shares, and are equal with prefetching."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snac_core.errors import UserError
from snac_runner.data.corpus import Corpus
from snac_runner.data.loading import PrefetchingLoader
from snac_runner.pretrain.data import SpeechMix, _counts
from snac_runner.pretrain.settings import Augmentation


def mix(corpus: Corpus, batch: int = 3) -> SpeechMix:
    return SpeechMix([(corpus, 1.0)], 8000, 2000, batch, Augmentation(), seed=1)


def test_a_batch_depends_on_its_step_alone(corpus: Corpus) -> None:
    one, other = mix(corpus), mix(corpus)
    other.at(5)
    assert torch.equal(one.at(3), other.at(3))
    assert not torch.equal(one.at(3), one.at(4))
    assert one.at(-1).shape == (3, 1, 2000)


def test_prefetched_batches_are_equal_in_any_order(corpus: Corpus) -> None:
    plain, prefetched = mix(corpus), PrefetchingLoader(mix(corpus), last=6, workers=2)
    try:
        for step in (0, 1, 2, 5, -1, 3, 4):
            assert torch.equal(prefetched.at(step), plain.at(step))
    finally:
        prefetched.close()


def test_a_signal_to_the_process_group_does_not_stop_the_workers(speech: Path) -> None:
    """As a terminal's Ctrl-C and `timeout` send it; in a subprocess with its own group."""
    script = f"""
import os, signal, sys
from snac_runner.data.open_corpus import open_corpus
from snac_runner.pretrain.settings import Augmentation
from snac_runner.data.loading import PrefetchingLoader
from snac_runner.pretrain.data import SpeechMix
from snac_runner.console import SILENT
from snac_runner.train import stoppable
mix = SpeechMix([(open_corpus({str(speech)!r}), 1.0)], 8000, 2000, 3, Augmentation(), seed=1)
prefetched = PrefetchingLoader(mix, 40, 1)
with stoppable(SILENT) as asked:
    for step in range(30):
        prefetched.at(step)
        if step == 2:
            os.killpg(os.getpgrp(), signal.SIGTERM)
    print("asked" if asked.is_set() else "not asked", step)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True)
    assert done.stdout.split() == ["asked", "29"], done.stderr


class Broken:
    """Has no audio."""

    steps_per_epoch = 1

    def at(self, step: int) -> torch.Tensor:
        raise UserError(f"no audio at step {step}")


def test_an_error_in_a_worker_is_one_line() -> None:
    prefetched = PrefetchingLoader(Broken(), last=6, workers=1)
    with pytest.raises(UserError, match=r"^no audio at step 0$"):
        prefetched.at(0)
    prefetched.close()


@pytest.mark.parametrize(
    ("shares", "batch", "expected"), [([0.75, 0.25], 8, [6, 2]), ([0.5, 0.3, 0.2], 12, [6, 4, 2]), ([1.0], 5, [5])]
)
def test_a_batch_is_shared_out_in_whole_items(shares: list[float], batch: int, expected: list[int]) -> None:
    assert _counts(shares, batch) == expected
