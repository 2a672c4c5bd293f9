"""Taps and `advance`: the path in pieces is the path."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codec import small, tone

from snac_core.codec import PRESETS, SNAC
from snac_core.errors import UserError

KINDS: list[dict[str, Any]] = [
    {},
    {"depthwise": False},
    {"attentive": True},
    {"attentive": True, "depthwise": False, "noise": False},
]


@pytest.mark.parametrize("kind", KINDS)
def test_tap_names_do_not_depend_on_attention_depthwise_or_noise(kind: dict[str, Any]) -> None:
    names = [tap.name for tap in small(**kind).taps]
    assert names == [
        *("encoder_0", "encoder_1", "encoder_2", "latent"),
        *("quantized", "decoder_0", "decoder_1", "decoder_2"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_passes_at_a_tap_has_its_channels_and_frame_rate(kind: dict[str, Any]) -> None:
    codec = small(**kind)
    padded = codec.preprocess(tone())
    seconds = padded.shape[-1] / codec.sampling_rate
    z_q, _ = codec.quantizer(codec.advance(padded, None, "latent"))
    for tap in codec.taps:
        before = tap.name == "latent" or tap.name.startswith("encoder")
        x = codec.advance(padded, None, tap.name) if before else codec.advance(z_q, "quantized", tap.name)
        assert x.shape == (2, tap.channels, round(tap.frame_rate * seconds))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_advancing_tap_by_tap_is_the_whole_bit_for_bit(kind: dict[str, Any]) -> None:
    codec = small(**kind)
    names = [tap.name for tap in codec.taps]
    middle = names.index("quantized")
    audio = tone()
    with codec.fixed_noise(1):
        expected, codes = codec(audio)
        x = codec.advance(codec.preprocess(audio), None, "encoder_0")
        for after, upto in pairwise(names[:middle]):
            x = codec.advance(x, after, upto)
        assert torch.equal(x, codec.encoder(codec.preprocess(audio)))
        x, got_codes = codec.quantizer(x)
        assert torch.equal(codec.decoder(x)[..., : audio.shape[-1]], expected)
        for after, upto in pairwise([*names[middle:], "audio"]):
            x = codec.advance(x, after, upto)
    assert torch.equal(x[..., : audio.shape[-1]], expected)
    assert all(torch.equal(a, b) for a, b in zip(codes, got_codes, strict=True))


def test_advancing_to_where_one_is_changes_nothing() -> None:
    x = torch.randn(1, 16, 4)
    assert small().advance(x, "latent", "latent") is x


def test_the_24_khz_model_has_taps_at_the_published_rates() -> None:
    with torch.random.fork_rng():
        taps = {tap.name: tap for tap in SNAC.from_config("snac_24khz").taps}
    assert taps["encoder_0"].frame_rate == 24_000
    assert taps["latent"].frame_rate == taps["quantized"].frame_rate == 46.875
    assert (taps["latent"].channels, taps["decoder_0"].channels, taps["decoder_4"].channels) == (768, 1024, 64)
    assert taps["decoder_4"].frame_rate == 24_000
    assert PRESETS["snac_24khz"]["vq_strides"] == [4, 2, 1]


@pytest.mark.parametrize(
    ("after", "upto", "message"),
    [
        ("encoder_9", "latent", "no tap 'encoder_9'.*did you mean 'encoder_"),
        (None, "latnet", "did you mean 'latent'"),
        (None, "audio", "quantizer"),
        ("latent", "quantized", "quantizer"),
        ("decoder_1", "decoder_0", "forward only"),
        ("audio", "audio", "nothing comes after"),
    ],
)
def test_a_way_that_does_not_exist_is_refused(after: str | None, upto: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small().advance(torch.randn(1, 1, 24), after, upto)


def test_an_activation_of_another_place_is_refused_with_both_shapes() -> None:
    with pytest.raises(UserError, match=r"\(1, 5, 4\); expected \(B, 16, F\) at tap 'latent'"):
        small().advance(torch.randn(1, 5, 4), "latent", "latent")


CODECS = {False: small(), True: small(attentive=True)}


@given(attentive=st.booleans(), samples=st.integers(1, 400), batch=st.integers(1, 3))
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_any_length_comes_back_at_its_length_and_pads_to_whole_codes(attentive: bool, samples: int, batch: int) -> None:
    codec = CODECS[attentive]
    audio = 0.1 * torch.ones(batch, 1, samples)
    padded = codec.preprocess(audio)
    assert torch.equal(padded[..., :samples], audio)
    assert not padded[..., samples:].any()
    assert padded.shape[-1] - samples < codec.hop_length * (8 if attentive else 4), "no more padding than needed"
    got, codes = codec(audio)
    assert got.shape == audio.shape
    frames = padded.shape[-1] // codec.hop_length
    assert [level.shape for level in codes] == [(batch, frames // stride) for stride in codec.vq_strides]
    assert codec.decode(codes).shape == padded.shape
    assert codec.decode(codes, length=samples).shape == audio.shape
