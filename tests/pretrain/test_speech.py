"""Batches are a pure function of the step, in the shares asked for, whoever prepares them."""

from __future__ import annotations

import pytest
import torch

from runner.data import Corpus
from runner.pretrain.settings import Augmentation
from runner.pretrain.speech import Ahead, SpeechMix, _counts


def mix(corpus: Corpus, batch: int = 3) -> SpeechMix:
    return SpeechMix([(corpus, 1.0)], 8000, 2000, batch, Augmentation(), seed=1)


def test_a_batch_depends_on_its_step_alone(corpus: Corpus) -> None:
    one, other = mix(corpus), mix(corpus)
    other.at(5)
    assert torch.equal(one.at(3), other.at(3))
    assert not torch.equal(one.at(3), one.at(4))
    assert one.at(-1).shape == (3, 1, 2000)


def test_batches_prepared_ahead_are_the_same_in_any_order(corpus: Corpus) -> None:
    plain, ahead = mix(corpus), Ahead(mix(corpus), last=6, workers=2)
    try:
        for step in (0, 1, 2, 5, -1, 3, 4):
            assert torch.equal(ahead.at(step), plain.at(step))
    finally:
        ahead.close()


@pytest.mark.parametrize(
    ("shares", "batch", "expected"), [([0.75, 0.25], 8, [6, 2]), ([0.5, 0.3, 0.2], 12, [6, 4, 2]), ([1.0], 5, [5])]
)
def test_a_batch_is_shared_out_in_whole_items(shares: list[float], batch: int, expected: list[int]) -> None:
    assert _counts(shares, batch) == expected
