"""Encoding, decoding and conversion in chunks: the same as on the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codec import small, tone
from torch import Tensor, nn
from toy_strategies import Gain, Shift, learned, speakers

from snac_core import (
    SNAC,
    ConditionedCodec,
    Conditioning,
    ConversionStream,
    DecoderStream,
    EncoderStream,
    Strategy,
    Tap,
    Taps,
    UserError,
    hookimpl,
)
from snac_core.codec.layers import NoiseSource
from snac_core.codec.streaming import (
    decoder_context,
    encoder_context,
    measured_receptive_field,
    needed,
)
from snac_core.testing.fixtures import speech_like

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"depthwise": False},
    "depthwise": {},
    "attention": {"attentive": True},
    "odd rates": {"encoder_rates": [3, 5, 2], "decoder_rates": [5, 2, 3], "vq_strides": [6, 3, 1]},
    "window and strides": {"attentive": True, "attn_window_size": 6, "vq_strides": [4, 2, 1]},
}


class Convolve(Strategy):
    """A residual convolution over time on both sides of the quantizer, of which the reach is not declared."""

    name = "convolve"
    before_taps = ("encoder_*", "latent")
    after_taps = ("quantized", "decoder_1")
    kernel = 7

    def __init__(self, config: Strategy.Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.convolutions = nn.ModuleDict(
            {
                tap.name: nn.Conv1d(tap.channels, tap.channels, self.kernel, padding=self.kernel // 2)
                for tap in taps.match((*self.before_taps, *self.after_taps))
            }
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def edit(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        return x + 0.1 * torch.tanh(self.convolutions[tap.name](x)) * cond.speaker[:, :1].unsqueeze(-1)

    before_vq = hookimpl(lambda self, x, cond, tap: self.edit(x, cond, tap))
    after_vq = hookimpl(lambda self, x, cond, tap: self.edit(x, cond, tap))


class OverTime(Strategy):
    """An edit of the latent that depends on all frames."""

    name = "over_time"

    def __init__(self, config: Strategy.Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.gain = nn.Parameter(torch.zeros(()))

    @hookimpl
    def before_vq(self, x: Tensor) -> Tensor:
        return x + self.gain * x.mean(dim=-1, keepdim=True)


class Position(OverTime):
    """An edit that depends on the position in the item, one frame at a time."""

    name = "position"

    @hookimpl
    def before_vq(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.arange(x.shape[-1], dtype=x.dtype)


class Louder(OverTime):
    """An edit of the frames that are louder than the mean: of all frames, although one frame hardly moves it."""

    name = "louder"

    @hookimpl
    def before_vq(self, x: Tensor) -> Tensor:
        power = x.square()
        return torch.where(power.mean(1, keepdim=True) > power.mean((1, 2), keepdim=True), x + self.gain, x)


def seconds(codec: SNAC, units: int) -> float:
    """Length of `units` coarse codes, or windows."""
    return units * codec.preprocess(torch.zeros(1, 1, 1)).shape[-1] / codec.sampling_rate


def pieces(audio: Tensor, size: int) -> Iterator[Tensor]:
    return iter(audio.split(size, dim=-1))


def joined(codes: Iterator[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(level, dim=-1) for level in zip(*codes, strict=True)]


# -------------------------------------------------------------------- equal to the whole


@pytest.mark.parametrize("config", CONFIGS)
@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_chunks_of_any_size_and_pieces_of_any_length_give_the_whole(config: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 3), label="weights"))
    strategies = data.draw(st.sampled_from([(), (Shift,), (Gain,), (Convolve, Gain)]), label="strategies")
    model = learned(*strategies, codec=small(**CONFIGS[config]))
    target = speakers(1) if strategies else None
    unit = model.codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]
    audio = tone(batch=2, samples=data.draw(st.integers(1, 25 * unit), label="length"))
    chunk = seconds(model.codec, data.draw(st.integers(1, 9), label="chunk"))
    size = data.draw(st.integers(max(1, unit // 3), 12 * unit), label="piece")
    with torch.no_grad(), model.codec.fixed_noise(5):
        whole = model.reconstruct(audio, None if target is None else Conditioning(target))
        stream = ConversionStream(model, target, seconds=chunk)
        converted = torch.cat(list(stream.run(pieces(audio, size))), dim=-1)
        before = target if model.acts(before_vq=True) else None
        codes = joined(EncoderStream(model, before, seconds=chunk).run(pieces(audio, size)))
    assert all(torch.equal(ours, expected) for ours, expected in zip(codes, whole.codes, strict=True))
    assert converted.shape == whole.audio.shape
    torch.testing.assert_close(converted, whole.audio, rtol=0, atol=1e-5)


@given(coarse=st.integers(1, 60), chunk=st.integers(1, 9), piece=st.integers(1, 20), config=st.sampled_from([*CONFIGS]))
@settings(deadline=None, max_examples=12)
def test_codes_in_pieces_decode_to_the_audio_of_the_whole(coarse: int, chunk: int, piece: int, config: str) -> None:
    model = learned(Gain, codec=small(**CONFIGS[config]))
    codec, target = model.codec, speakers(1)
    stride, window = codec.vq_strides[0], codec.attn_window_size or 1
    step = math.lcm(stride, window) // stride  # coarse codes of a unit
    codes = [torch.randint(32, (1, coarse * step * stride // s)) for s in codec.vq_strides]
    length = coarse * step * stride * codec.hop_length - 1
    with torch.no_grad(), codec.fixed_noise(2):
        whole = model.decode(codes, target, length=length)
        parts = zip(
            *(level.split(piece * step * stride // s, -1) for level, s in zip(codes, codec.vq_strides, strict=True)),
            strict=True,
        )
        stream = DecoderStream(model, target, seconds=seconds(codec, chunk))
        audio = torch.cat(list(stream.run(parts, length)), dim=-1)
    torch.testing.assert_close(audio, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["snac_24khz", "snac_32khz", "snac_44khz"])
@torch.no_grad()
def test_narrow_codecs_with_the_rates_of_the_released_models_convert_in_chunks(name: str) -> None:
    config = SNAC.from_config(name).config
    narrow = {"encoder_dim": 4, "latent_dim": None, "decoder_dim": 64 if config["attn_window_size"] else 16}
    codec = SNAC(**{**config, **narrow})
    model = ConditionedCodec(codec.eval())
    audio = tone(batch=1, samples=round(seconds(codec, 9) * codec.sampling_rate) - 100)
    with codec.fixed_noise(0):
        whole = model.reconstruct(audio)
        stream = ConversionStream(model, seconds=seconds(codec, 1))
        converted = torch.cat(list(stream.run(pieces(audio, 5000))), dim=-1)
        codes = joined(EncoderStream(model, seconds=seconds(codec, 1)).run(pieces(audio, 5000)))
    assert all(torch.equal(ours, expected) for ours, expected in zip(codes, whole.codes, strict=True))
    torch.testing.assert_close(converted, whole.audio, rtol=0, atol=1e-5)


@torch.no_grad()
def test_with_less_context_than_the_receptive_field_the_result_differs() -> None:
    """The context is needed: what the equality tests would show of a context that is too short."""
    model = ConditionedCodec(small())
    audio = tone(batch=1, samples=1200)
    with model.codec.fixed_noise(0):
        whole = model.reconstruct(audio).audio
        stream = ConversionStream(model, seconds=seconds(model.codec, 1), lookahead=0)
        converted = torch.cat(list(stream.run([audio])), dim=-1)
    assert float((converted - whole).abs().max()) > 1e-3


@torch.no_grad()
def test_the_result_does_not_depend_on_the_pieces() -> None:
    model, audio = ConditionedCodec(small()), tone(samples=700)
    with model.codec.fixed_noise(0):
        stream = ConversionStream(model, seconds=seconds(model.codec, 2))
        first, second = (torch.cat(list(stream.run(pieces(audio, size))), dim=-1) for size in (17, 700))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


# -------------------------------------------------------------------- receptive fields


@pytest.mark.parametrize("config", CONFIGS)
def test_computed_receptive_fields_are_the_measured_ones(config: str) -> None:
    """Change one input position: the outputs that change are those whose computed stretch contains it."""
    codec = small(**CONFIGS[config]).double()
    window = codec.attn_window_size or 1
    hop = codec.hop_length
    for after, upto, per_input, per_output in ((None, "latent", hop, 1), ("quantized", "audio", 1, hop)):
        layers = codec.layers(after, upto)
        x = torch.randn(1, 1 if after is None else codec.latent_dim, 60 * window * per_input, dtype=torch.float64)
        for position in (x.shape[-1] // 2, x.shape[-1] // 2 + hop // 2 + 1):
            changed = x.clone()
            changed[..., position] += 1
            with torch.no_grad(), codec.fixed_noise(0):
                differs = (codec.advance(x, after, upto) != codec.advance(changed, after, upto)).any(1)[0]
            for output, moved in enumerate(differs.tolist()):
                first, last = output, output + 1
                for layer in reversed(layers):
                    first, last = needed(layer, first, last)
                assert moved == (first <= position < last), f"output {output} of {len(differs)}, input {position}"
        assert len(differs) == 60 * window * per_output


def test_contexts_of_the_bundled_base_in_codes_and_frames() -> None:
    """0.32 s of audio on each side of a chunk give equal codes; see `docs/performance.md`."""
    model = ConditionedCodec(SNAC.from_pretrained("tiny"))
    encoder, decoder = encoder_context(model), decoder_context(model)
    assert (encoder.unit, encoder.before, encoder.after) == (640, 8, 8)
    assert decoder.unit == 1
    assert decoder.before == decoder.after < 32


def edit_of(model: ConditionedCodec, tap: str) -> Any:
    (edit,) = model.edits[tap]
    return edit


@pytest.mark.parametrize("tap", ["encoder_0", "latent", "quantized", "decoder_1"])
def test_the_receptive_field_of_an_edit_is_measured(tap: str) -> None:
    model = learned(Convolve)
    cond, like = Conditioning(speakers(1)), next(model.codec.parameters())
    assert measured_receptive_field(edit_of(model, tap), cond, 4, like) == Convolve.kernel // 2


@pytest.mark.parametrize("strategy", [OverTime, Position, Louder])
def test_an_edit_that_depends_on_all_frames_or_on_the_position_is_found(strategy: type[Strategy]) -> None:
    model = learned(strategy)
    cond, like = Conditioning(speakers(1)), next(model.codec.parameters())
    assert math.isinf(measured_receptive_field(edit_of(model, "latent"), cond, 4, like))


@torch.no_grad()
def test_what_depends_on_all_frames_is_processed_whole_with_a_warning() -> None:
    model, audio, target = learned(OverTime, Gain), tone(samples=500), speakers(1)
    with model.codec.fixed_noise(1):
        with pytest.warns(UserWarning, match=r"'over_time' at tap 'latent' depends on all frames.*whole"):
            stream = ConversionStream(model, target, seconds=seconds(model.codec, 1))
        whole = model.reconstruct(audio, Conditioning(target)).audio
        assert all(stream.push(piece).shape[-1] == 0 for piece in pieces(audio, 100))
        torch.testing.assert_close(stream.flush(), whole, rtol=0, atol=1e-5)
    assert math.isinf(stream.latency)


# -------------------------------------------------------------------- noise


@given(first=st.integers(0, 300), frames=st.integers(1, 200), per_frame=st.sampled_from([1, 3, 700]))
@settings(deadline=None, max_examples=40)
def test_noise_of_a_part_is_that_part_of_the_noise_of_the_whole(first: int, frames: int, per_frame: int) -> None:
    source = NoiseSource()
    with source.fixed(5):
        whole = source.draw(torch.zeros(1, 2, (first + frames) * per_frame), 1, per_frame)
    with source.fixed(5, first):
        part = source.draw(torch.zeros(1, 2, frames * per_frame), 1, per_frame)
    assert torch.equal(part, whole[..., first * per_frame :])


def test_noise_of_a_long_item_does_not_repeat() -> None:
    source = NoiseSource()
    with source.fixed(5):
        noise = source.draw(torch.zeros(1, 1, 4 * 2**16), 0)[0, 0]
    parts = noise.reshape(4, -1)
    assert float((parts @ parts.T / 2**16 - torch.eye(4)).abs().max()) < 0.03


@torch.no_grad()
def test_outside_of_fixed_noise_equal_torch_seeds_give_equal_streams() -> None:
    model, audio = ConditionedCodec(small()), tone(samples=300)

    def converted(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat(list(ConversionStream(model).run([audio])), dim=-1)

    assert torch.equal(converted(1), converted(1))
    assert not torch.equal(converted(1), converted(2))


# -------------------------------------------------------------------- live


@pytest.mark.parametrize("config", CONFIGS)
@given(chunk=st.integers(1, 5), lookahead=st.one_of(st.none(), st.floats(0, 0.1)), piece=st.integers(1, 50))
@settings(deadline=None, max_examples=3)
def test_every_sample_is_returned_within_the_latency(
    config: str, chunk: int, lookahead: float | None, piece: int
) -> None:
    model = ConditionedCodec(small(**CONFIGS[config]))
    stream = ConversionStream(model, seconds=seconds(model.codec, chunk), lookahead=lookahead)
    latency = round(stream.latency * model.codec.sampling_rate)
    audio = tone(batch=1, samples=3 * latency + 100)
    pushed = returned = worst = 0
    for part in pieces(audio, piece):
        pushed += part.shape[-1]
        returned += stream.push(part).shape[-1]
        worst = max(worst, pushed - returned)
    assert latency - piece <= worst <= latency + piece, "stated, and reached"
    assert returned + stream.flush().shape[-1] == pushed


@torch.no_grad()
def test_a_smaller_look_ahead_is_faster_and_has_no_clicks() -> None:
    """A step between chunks is a slope that is larger there than in the whole."""
    model, audio = ConditionedCodec("tiny"), speech_like(16000, 2.0, 1)
    with model.codec.fixed_noise(0):
        whole = model.reconstruct(audio).audio
        slopes = {}
        for lookahead, joined in itertools.product((0.0, 0.12), (True, False)):
            stream = ConversionStream(model, seconds=0.16, lookahead=lookahead)
            stream._decoder._windows._fade = joined
            assert stream.lookahead == pytest.approx(lookahead)
            assert stream.latency == pytest.approx(0.16 + lookahead)
            converted = torch.cat(list(stream.run([audio])), dim=-1)
            first = -round(stream.lookahead * 16000) % 2560 or 2560
            places = torch.arange(first, audio.shape[-1] - 1, 2560) - 1
            steps = [float(wave[0, 0].diff()[places].square().mean()) for wave in (converted, whole)]
            slopes[lookahead, joined] = (steps[0] / steps[1]) ** 0.5
    assert slopes[0.12, True] < 1.3
    assert slopes[0.0, True] < 1.6 < slopes[0.0, False] / 1.5, "there is nothing to fade into, but no step either"


@torch.no_grad()
def test_a_stream_holds_no_more_than_a_window() -> None:
    model = ConditionedCodec(small())
    stream = ConversionStream(model, seconds=seconds(model.codec, 2))
    unit, context = stream._encoder.context.unit, stream._encoder.context
    for _ in range(300):
        stream.push(torch.zeros(1, 1, unit))
        held = stream._encoder._windows._held
        assert held is not None
        assert held.shape[-1] <= (context.before + 2 + context.after) * unit
        assert held.untyped_storage().nbytes() <= 2 * held.nbytes + 4 * unit


@torch.no_grad()
def test_after_a_flush_the_stream_converts_another_item() -> None:
    stream = ConversionStream(ConditionedCodec(small()), seconds=0.01)
    audio = tone(samples=333)
    first, second = (torch.cat(list(stream.run(pieces(audio, 100))), dim=-1) for _ in range(2))
    assert torch.equal(first, second)


# -------------------------------------------------------------------- refusals


def test_what_a_stream_cannot_do_is_refused() -> None:
    model = learned(Gain)
    with pytest.raises(UserError, match=r"acts only after VQ.*decode"):
        EncoderStream(model, speakers(1))
    with pytest.raises(UserError, match=r"acts only before VQ.*encode"):
        DecoderStream(learned(Shift), speakers(1))
    with pytest.raises(UserError, match="seconds is a number above 0; got 0"):
        ConversionStream(model, seconds=0)
    with pytest.raises(UserError, match="lookahead is a number of seconds, 0 or more; got -1"):
        ConversionStream(model, lookahead=-1)
    with pytest.raises(UserError, match="no audio was pushed"):
        ConversionStream(model).flush()
    with pytest.raises(UserError, match=r"audio has the shape \(B, 1, T\)"):
        ConversionStream(model).push(torch.zeros(100))
    with pytest.raises(UserError, match="NaN or infinity"):
        ConversionStream(model).push(torch.full((1, 1, 10), torch.nan))
    stream = ConversionStream(model)
    stream.push(torch.zeros(1, 1, 100))
    with pytest.raises(UserError, match=r"got 2 items, after 1; expected as many until flush"):
        stream.push(torch.zeros(2, 1, 100))
    codes = model.encode(tone(samples=24))
    with pytest.raises(UserError, match="length 1000 of audio from codes that hold"):
        list(DecoderStream(model).run([codes], 1000))
