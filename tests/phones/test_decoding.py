"""From the network's classes to phones, and from phones to an error rate."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_runner.evaluate.content import error_rate
from snac_runner.evaluate.phone_recogniser import BLANK, PHONES, PhoneNetwork, decode

phones = st.lists(st.sampled_from(PHONES[:6]), max_size=12)


def _logits(path: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(path, dtype=torch.long), len(PHONES) + 1).float()


@given(phones, st.data())
def test_every_path_of_a_sequence_is_read_as_that_sequence(said: list[str], data: st.DataObject) -> None:
    path: list[int] = [BLANK] * data.draw(st.integers(0, 2))
    for index, phone in enumerate(said):
        path += [PHONES.index(phone) + 1] * data.draw(st.integers(1, 3))
        again = index + 1 < len(said) and said[index + 1] == phone  # two equal phones need a blank between them
        path += [BLANK] * data.draw(st.integers(1 if again else 0, 2))
    assert decode(_logits(path)) == tuple(said)


def test_silence_has_no_phones() -> None:
    assert decode(_logits([BLANK] * 5)) == ()


@given(phones.filter(bool), phones)
@settings(max_examples=200)
def test_the_error_rate_is_the_edit_distance_per_phone_said_and_one_at_most(said: list[str], heard: list[str]) -> None:
    assert error_rate(said, heard) == pytest.approx(min(1.0, _edit_distance(tuple(said), tuple(heard)) / len(said)))


@cache
def _edit_distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Levenshtein's distance by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    substituted = _edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(_edit_distance(a[1:], b) + 1, _edit_distance(a, b[1:]) + 1, substituted)


@given(phones.filter(bool))
def test_what_is_heard_as_said_has_no_errors_and_silence_has_all(said: list[str]) -> None:
    assert error_rate(said, said) == 0
    assert error_rate(said, []) == 1


def test_an_error_rate_of_nothing_said_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        error_rate([], ["AA"])


def test_frames_of_the_output_lie_30_ms_apart_and_an_item_is_read_by_itself() -> None:
    network = PhoneNetwork().eval()
    audio = torch.randn(3, 48000)
    with torch.no_grad():
        together, alone = network(audio), network(audio[1:2])
    assert together.shape == (3, 101, len(PHONES) + 1)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-4)
