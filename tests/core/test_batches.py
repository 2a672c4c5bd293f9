"""Batches of items of different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codec import small
from torch import Tensor
from toy_strategies import Gain, Shift, learned, speakers

from snac_core import UserError


def batch_of(items: list[Tensor]) -> Tensor:
    """Items (1, 1, T) in one batch (B, 1, T), with noise after short ones: it must not be used."""
    longest = max(item.shape[-1] for item in items)
    return torch.cat([torch.cat([item, torch.randn(1, 1, longest - item.shape[-1])], dim=-1) for item in items])


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4), attentive=st.booleans(), seed=st.integers(0, 9))
def test_each_item_gets_the_codes_and_the_audio_that_it_gets_alone(
    lengths: list[int], attentive: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    codec = small(attentive=attentive)
    items = [0.3 * torch.randn(1, 1, length) for length in lengths]
    with torch.no_grad(), codec.fixed_noise(0):
        codes = codec.encode(batch_of(items), lengths=lengths)
        audio = codec.decode(codes, lengths=torch.tensor(lengths))
        for row, item in enumerate(items):
            alone = codec.encode(item)
            for level, expected in zip(codes, alone, strict=True):
                assert torch.equal(level[row, : expected.shape[1]], expected[0])
                assert (level[row, expected.shape[1] :] == -1).all()
            heard = codec.decode(alone, length=lengths[row])
            torch.testing.assert_close(audio[row : row + 1, :, : lengths[row]], heard, atol=1e-5, rtol=0)
            assert not audio[row, :, lengths[row] :].any()


def test_conditioned_items_of_a_batch_get_what_they_get_alone() -> None:
    model, targets, lengths = learned(Shift, Gain), speakers(3), [120, 33, 240]
    items = [0.3 * torch.randn(1, 1, length) for length in lengths]
    with torch.no_grad(), model.codec.fixed_noise(0):
        codes = model.encode(batch_of(items), targets, lengths=lengths)
        audio = model.decode(codes, targets, lengths=lengths)
        for row, item in enumerate(items):
            alone = model.encode(item, targets[row])
            assert all(torch.equal(a[row, : b.shape[1]], b[0]) for a, b in zip(codes, alone, strict=True))
            expected = model.decode(alone, targets[row], length=lengths[row])
            torch.testing.assert_close(audio[row : row + 1, :, : lengths[row]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([10], "for 2 items"),
        ([10, 0], "length of 0; expected a whole number of samples from 1 to 48"),
        ([10, 49], "length of 49"),
        ([10, 2.5], "length of 2.5"),
        (torch.tensor(3), "one number of samples per item"),
    ],
)
def test_lengths_that_do_not_fit_the_batch_are_refused(lengths: Any, message: str) -> None:
    codec = small()
    with pytest.raises(UserError, match=message):
        codec.encode(torch.randn(2, 1, 48), lengths=lengths)
    with pytest.raises(UserError, match=message):
        codec.decode([torch.zeros(2, n, dtype=torch.long) for n in (2, 4, 8)], lengths=lengths)


def test_codes_of_a_padded_batch_say_that_they_need_lengths() -> None:
    codec = small()
    codes = codec.encode(torch.randn(2, 1, 96), lengths=[96, 24])
    with pytest.raises(UserError, match="give lengths"):
        codec.decode(codes)
    with pytest.raises(UserError, match="got both"):
        codec.decode(codes, 24, lengths=[96, 24])
