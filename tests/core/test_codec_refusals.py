"""What a codec refuses, and that the message says what was got, what was expected, and the nearest right answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_codec import ATTENTIVE, PLAIN, small, tone

from snac_core.codec import SNAC
from snac_core.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_rates": [3, 3]}, r"encoder_rates \[2, 3\] make a hop of 6, decoder_rates \[3, 3\] one of 9"),
        ({"decoder_dim": 18}, "decoder_dim 18 is halved 2 times; expected a multiple of 4"),
        ({"latent_dim": 17}, "latent_dim 17 .* expected 16"),
        ({"encoder_rates": []}, r"encoder_rates is a list .* got \[\]"),
        ({"encoder_rates": [1, 6]}, "encoder_rates is a whole number of at least 2; got 1"),
        ({"encoder_rates": "23"}, "encoder_rates is a list"),
        ({"vq_strides": [4, 3]}, r"must divide the first; got \[4, 3\]"),
        ({"codebook_size": 0}, "codebook_size is a whole number of at least 1; got 0"),
        ({"sampling_rate": 16000.0}, r"sampling_rate is a whole number .* got 16000\.0"),
        ({"noise": 1}, "noise is true or false; got 1"),
        ({"attn_window_size": 8}, "latent_dim is 16, expected a multiple of 64"),
    ],
)
def test_a_configuration_that_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SNAC(**{**PLAIN, **changes})


def test_a_decoder_too_narrow_for_attention() -> None:
    with pytest.raises(UserError, match="decoder_dim is 32, expected a multiple of 64"):
        SNAC(**{**ATTENTIVE, "decoder_dim": 32})


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(100), r"\(B, 1, T\): batch, one channel, samples; got \(100,\)"),
        (torch.zeros(1, 100), r"got \(1, 100\)"),
        (torch.zeros(1, 2, 100), r"got \(1, 2, 100\)"),
        (torch.zeros(1, 1, 0), "holds nothing"),
        (torch.zeros(0, 1, 10), "holds nothing"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), "floating point .* got torch.int16"),
        (torch.zeros(1, 1, 100, dtype=torch.float64), r"audio is torch\.float64, .* weights are torch\.float32"),
        (torch.zeros(1, 1, 100, device="meta"), "audio is on meta, the codec on cpu"),
        ([0.0, 1.0], r"a tensor \(B, 1, T\); got list"),
    ],
)
@pytest.mark.parametrize("verb", ["encode", "forward"])
def test_audio_of_another_kind(verb: str, audio: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(small(), verb)(audio)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_audio_that_is_not_finite_names_the_item(value: float) -> None:
    audio = tone(3)
    audio[1, 0, 7] = value
    for verb in (small().encode, small()):
        with pytest.raises(UserError, match="NaN or infinity in item 1"):
            verb(audio)


def codes_of_8_frames() -> list[torch.Tensor]:
    return [torch.zeros(2, n, dtype=torch.long) for n in (2, 4, 8)]


@pytest.mark.parametrize(
    ("level", "wrong", "message"),
    [
        (1, torch.zeros(2, 5, dtype=torch.long), r"level 1 have the shape \(2, 5\); expected \(2, 4\)"),
        (2, torch.zeros(1, 8, dtype=torch.long), r"level 2 have the shape \(1, 8\); expected \(2, 8\)"),
        (2, torch.full((2, 8), 32), "level 2 reach from 32 to 32; expected 0 to 31"),
        (0, torch.full((2, 2), -1), "level 0 reach from -1"),
        (0, torch.zeros(2, 2), r"level 0 are integers .* torch\.float32"),
        (0, torch.zeros(2, 2, dtype=torch.bool), r"level 0 are integers .* torch\.bool"),
        (0, torch.zeros(2, dtype=torch.long), r"level 0 are integers \(B, F / 4\); got \(2,\)"),
        (0, torch.zeros(2, 0, dtype=torch.long), "hold nothing"),
    ],
)
def test_codes_of_another_shape_type_or_range(level: int, wrong: torch.Tensor, message: str) -> None:
    codes = codes_of_8_frames()
    codes[level] = wrong
    with pytest.raises(UserError, match=message):
        small().decode(codes)


def test_codes_of_another_number_of_levels() -> None:
    with pytest.raises(UserError, match="3 tensors, one per codebook; got 2"):
        small().decode(codes_of_8_frames()[:2])
    with pytest.raises(UserError, match=r"3 tensors, one per codebook; got one tensor \(2, 8\)"):
        small().decode(codes_of_8_frames()[2])


def test_codes_that_do_not_fill_an_attention_window() -> None:
    codes = [torch.zeros(2, n, dtype=torch.long) for n in (1, 2, 4)]
    with pytest.raises(UserError, match=r"4 frames; .* multiple of 8 frames, that is of 2 codes at level 0"):
        small(attentive=True).decode(codes)
    with pytest.raises(UserError, match="attention over 4 frames; expected a multiple of 8"):
        small(attentive=True).decoder(torch.zeros(1, 64, 4))


@pytest.mark.parametrize("length", [0, -1, 49])
def test_a_length_that_the_codes_do_not_hold(length: int) -> None:
    with pytest.raises(UserError, match=f"length {length} .* hold 48 samples; expected 1 to 48"):
        small().decode(codes_of_8_frames(), length=length)
