"""The learning-rate schedule: where it rises, stays and falls."""

import math
from itertools import pairwise

import pytest

from snac_runner.schedule import learning_rate


def test_the_rate_rises_linearly_to_the_peak_and_falls_to_its_minimum():
    rates = [learning_rate(s, 2.0, warmup_steps=4, decay_start=4, decay_end=20, min_ratio=0.1) for s in range(1, 21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(earlier > later for earlier, later in pairwise(rates[3:]))
    assert rates[-1] == 0.2
    assert rates[11] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # halfway along the cosine


def test_the_rate_stays_at_the_peak_between_warm_up_and_decay():
    rates = [learning_rate(s, 3.0, warmup_steps=2, decay_start=8, decay_end=10) for s in range(1, 13)]
    assert rates[1:8] == [3.0] * 7
    assert rates[8] == pytest.approx(1.5)
    assert rates[9:] == [0.0] * 3  # after the end too


def test_without_warm_up_the_first_step_has_its_place_on_the_cosine():
    rate = learning_rate(1, 1.0, warmup_steps=0, decay_start=0, decay_end=4)
    assert rate == (1 + math.cos(math.pi / 4)) / 2


def test_a_training_that_is_shorter_than_its_warm_up_only_rises():
    rates = [learning_rate(s, 1.0, warmup_steps=10, decay_start=10, decay_end=5) for s in range(1, 6)]
    assert rates == [s / 10 for s in range(1, 6)]
