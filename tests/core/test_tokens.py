"""Codes as one sequence of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codec import small

from snac_core import UserError
from snac_core.codec.tokens import OFFSETS, ORDERS, TokenLayout

SIZE = 4096


def frames_of(*counts: int, frames: int = 2) -> list[torch.Tensor]:
    """Codes in which level i counts up from 100 * i."""
    return [100 * level + torch.arange(frames * count)[None] for level, count in enumerate(counts)]


def layout(order: str, offsets: str = "none", **changes: Any) -> TokenLayout:
    return TokenLayout(**{"strides": (4, 2, 1), "codebook_size": SIZE, "order": order, "offsets": offsets, **changes})


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("coarse_to_fine", [0, 1, 100, 101, 102, 103, 200, 201, 202, 203, 204, 205, 206, 207]),
        ("frame", [0, 100, 101, 200, 201, 202, 203, 1, 102, 103, 204, 205, 206, 207]),
        ("interleaved", [0, 100, 200, 201, 101, 202, 203, 1, 102, 204, 205, 103, 206, 207]),
    ],
)
def test_each_order_places_the_codes_as_its_docstring_says(order: str, expected: list[int]) -> None:
    assert layout(order).flatten(frames_of(1, 2, 4)).tolist() == [expected]


def test_orpheus_layout_is_read_as_its_own_decoder_reads_it() -> None:
    """Seven tokens a frame, each position with tokens of its own, as in `redistribute_codes` of Orpheus-TTS."""
    codes = [torch.randint(SIZE, (1, 5 * count)) for count in (1, 2, 4)]
    tokens = layout("interleaved", "position", first_token=128266).flatten(codes)[0].tolist()
    levels: list[list[int]] = [[], [], []]
    for i in range(0, len(tokens), 7):
        frame = [token - 128266 - position * SIZE for position, token in enumerate(tokens[i : i + 7])]
        levels[0] += [frame[0]]
        levels[1] += [frame[1], frame[4]]
        levels[2] += [frame[2], frame[3], frame[5], frame[6]]
    assert levels == [level[0].tolist() for level in codes]


@settings(deadline=None)
@given(
    strides=st.sampled_from([(4, 2, 1), (8, 4, 2, 1), (6, 3, 2, 1), (2, 2), (1,), (4, 1)]),
    order=st.sampled_from(ORDERS),
    offsets=st.sampled_from(OFFSETS),
    batch=st.integers(1, 3),
    frames=st.integers(1, 5),
    first=st.integers(0, 10**6),
    seed=st.integers(0, 100),
)
def test_unflatten_gives_back_what_was_flattened(
    strides: tuple[int, ...], order: str, offsets: str, batch: int, frames: int, first: int, seed: int
) -> None:
    if order == "coarse_to_fine" and offsets == "position":
        offsets = "level"
    tokens_of = TokenLayout(strides, SIZE, order, offsets, first)
    draw = torch.Generator().manual_seed(seed)
    codes = [torch.randint(SIZE, (batch, frames * strides[0] // stride), generator=draw) for stride in strides]
    tokens = tokens_of.flatten(codes)
    assert tokens.shape == (batch, frames * tokens_of.tokens_per_frame)
    assert first <= int(tokens.min())
    assert int(tokens.max()) < first + tokens_of.vocabulary
    assert all(torch.equal(a, b) for a, b in zip(tokens_of.unflatten(tokens), codes, strict=True))


def test_tokens_of_two_levels_never_coincide() -> None:
    tokens = layout("frame", "level").flatten([torch.zeros(1, n, dtype=torch.int16) for n in (1, 2, 4)])
    assert tokens.tolist() == [[0, SIZE, SIZE, 2 * SIZE, 2 * SIZE, 2 * SIZE, 2 * SIZE]]
    assert [layout("frame", kind).vocabulary // SIZE for kind in OFFSETS] == [1, 3, 7]


def test_the_layout_of_a_codec_fits_its_codes() -> None:
    codec = small()
    codes = codec.encode(0.1 * torch.randn(1, 1, 240))
    tokens = codec.token_layout("interleaved", offsets="position")
    assert torch.equal(codec.decode(tokens.unflatten(tokens.flatten(codes)[0])).isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 9, dtype=torch.long), "1 frames of 7 and 2 tokens of another; give the first 7, or all 14"),
        (torch.zeros(1, 3, dtype=torch.long), "0 frames of 7 and 3 tokens of another; expected at least 7"),
        (torch.zeros(7, dtype=torch.long), "token 0 at position 1 of frame 0 of item 0; expected 4096 to 8191"),
        (torch.zeros(7), "integer tensor"),
        ([1, 2], "got list"),
    ],
)
def test_tokens_that_are_no_frames_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout("interleaved", "level").unflatten(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "interleave"}, "did you mean 'interleaved'"),
        ({"offsets": "levels"}, "did you mean 'level'"),
        ({"first_token": -1}, "at least 0; got -1"),
        ({"order": "coarse_to_fine", "offsets": "position"}, "'position' need frames"),
    ],
)
def test_unknown_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout(**{"order": "frame", **changes})
