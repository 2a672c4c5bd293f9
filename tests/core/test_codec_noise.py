"""The decoder's noise: upstream's stream outside of `fixed_noise`, a function of the seed inside."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codec import small, tone
from torch._dynamo.testing import CompileCounter

from snac_core.codec import SNAC
from snac_core.codec.layers import NoiseSource
from snac_core.errors import UserError


def drawn(codec: SNAC, batch: int, samples: int, block: int = 0) -> torch.Tensor:
    """The noise that a block would add to a batch, in the shape in which it is broadcast."""
    return codec.noise.draw(torch.zeros(batch, 3, samples), block)


@torch.no_grad()
def test_two_decodes_differ_and_equal_seeds_give_equal_audio() -> None:
    codec = small()
    codes = codec.encode(tone())
    torch.manual_seed(7)
    first = codec.decode(codes)
    assert not torch.equal(codec.decode(codes), first)
    torch.manual_seed(7)
    assert torch.equal(codec.decode(codes), first)


@torch.no_grad()
def test_inside_fixed_noise_every_decode_restarts_and_seeds_differ() -> None:
    codec = small()
    codes = codec.encode(tone())
    with codec.fixed_noise(1):
        first, again = codec.decode(codes), codec.decode(codes)
    with codec.fixed_noise(1):
        later = codec.decode(codes)
    with codec.fixed_noise(2):
        other = codec.decode(codes)
    assert torch.equal(first, again)
    assert torch.equal(first, later)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_threads_that_fix_the_same_noise_do_not_end_each_others_blocks() -> None:
    codec = small()
    codes = codec.encode(tone(1, 2400))

    def decoded(_: int) -> torch.Tensor:
        with torch.no_grad(), codec.fixed_noise(1):
            return codec.decode(codes)

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(decoded, range(64))
    assert all(torch.equal(first, other) for other in others)
    assert codec.noise.seed is None
    with codec.fixed_noise(2), codec.fixed_noise(1):
        with codec.fixed_noise(2):
            pass
        assert codec.noise.seed == 1


def test_fixed_noise_leaves_the_global_stream_alone() -> None:
    codec = small()
    state = torch.get_rng_state()
    with codec.fixed_noise(1):
        codec(torch.full((1, 1, 24), 0.1))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_an_items_noise_does_not_depend_on_batch_size_or_row() -> None:
    codec = small()
    z_q = torch.randn(1, codec.latent_dim, 8)
    others = torch.randn(4, codec.latent_dim, 8)
    with codec.fixed_noise(3):
        assert drawn(codec, 1, 50).shape == drawn(codec, 5, 50).shape == (1, 1, 50)
        alone = codec.decoder(z_q)
        for row in (0, 2, 4):
            batch = torch.cat([others[:row], z_q, others[row:]])
            # the same noise; convolutions of other batch sizes may round differently in the last bit
            torch.testing.assert_close(codec.decoder(batch)[row : row + 1], alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_equal_items_of_a_batch_come_out_equal() -> None:
    codec = small()
    with codec.fixed_noise(3):
        audio = codec.decoder(torch.randn(1, codec.latent_dim, 8).expand(3, -1, -1))
    for other in audio[1:]:  # close, not equal: see above
        torch.testing.assert_close(other, audio[0], rtol=0, atol=1e-6)


@given(short=st.integers(1, 300), more=st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_a_short_items_noise_is_the_beginning_of_a_long_ones(short: int, more: int) -> None:
    source = NoiseSource()
    with source.fixed(5):
        little, much = (source.draw(torch.zeros(1, 2, n), 1) for n in (short, short + more))
    assert torch.equal(little, much[..., :short])


def test_blocks_have_different_noise_of_unit_variance() -> None:
    codec = small()
    with codec.fixed_noise(3):
        first, second = drawn(codec, 1, 20_000, block=0), drawn(codec, 1, 20_000, block=1)
    assert abs((first * second).mean()) < 0.05
    assert abs(first.std() - 1) < 0.03
    assert abs(first.mean()) < 0.03


def test_fixed_noise_nests_and_ends_where_it_was_after_an_exception() -> None:
    codec = small()
    with codec.fixed_noise(1):
        outer = drawn(codec, 1, 20)
        with codec.fixed_noise(2):
            assert not torch.equal(drawn(codec, 1, 20), outer)
        assert torch.equal(drawn(codec, 1, 20), outer)
        with pytest.raises(UserError, match="codes"), codec.fixed_noise(2):
            codec.decode([])
        assert torch.equal(drawn(codec, 1, 20), outer)
    assert drawn(codec, 4, 20).shape == (4, 1, 20), "outside, every item has noise of its own"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda codec: pickle.loads(pickle.dumps(codec))])
@torch.no_grad()
def test_a_copy_made_inside_fixed_noise_is_outside_of_it_and_independent(duplicate) -> None:  # type: ignore[no-untyped-def]
    codec = small()
    with codec.fixed_noise(1):
        twin = duplicate(codec)
        assert drawn(twin, 4, 20).shape == (4, 1, 20)
        with twin.fixed_noise(2):
            other = drawn(twin, 1, 20)
        with twin.fixed_noise(1):
            assert torch.equal(drawn(twin, 1, 20), drawn(codec, 1, 20))
            z_q = torch.randn(1, codec.latent_dim, 4)
            assert torch.equal(twin.decoder(z_q), codec.decoder(z_q)), "the copy's blocks listen to the copy's source"
        assert not torch.equal(drawn(codec, 1, 20), other)


@torch.no_grad()
def test_a_run_from_a_late_decoder_tap_meets_the_noise_of_the_full_run() -> None:
    codec = small()
    z_q = torch.randn(2, codec.latent_dim, 8)
    with codec.fixed_noise(4):
        middle = codec.advance(z_q, "quantized", "decoder_1")
        whole = codec.advance(z_q, "quantized", "audio")
    with codec.fixed_noise(4):
        assert torch.equal(codec.advance(middle, "decoder_1", "audio"), whole)


def test_noise_first_drawn_in_inference_mode_can_be_trained_with_next() -> None:
    codec = small()
    z_q = torch.randn(1, codec.latent_dim, 4, requires_grad=True)
    with codec.fixed_noise(1):
        with torch.inference_mode():
            codec.decoder(z_q)
        codec.decoder(z_q).sum().backward()
    assert z_q.grad is not None


def test_without_noise_blocks_decoding_is_repeatable() -> None:
    codec = small(noise=False)
    codes = codec.encode(tone())
    assert torch.equal(codec.decode(codes), codec.decode(codes))


def test_a_seed_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"whole number; got 1\.5"), small().fixed_noise(1.5):  # type: ignore[arg-type]
        pass


@torch.no_grad()
def test_a_compiled_decoder_is_not_compiled_again_for_another_seed(recwarn: pytest.WarningsRecorder) -> None:
    codec = small()
    codes = codec.encode(tone())
    expected = []
    for seed in range(3):
        with codec.fixed_noise(seed):
            expected.append(codec.decode(codes))
    counter = CompileCounter()
    for layer in codec.decoder.model:
        layer.compile(backend=counter)
    compiled = []
    for seed, audio in enumerate(expected):
        with codec.fixed_noise(seed):
            torch.testing.assert_close(codec.decode(codes), audio, rtol=0, atol=1e-6)
        compiled.append(counter.frame_count)
    assert 0 < compiled[0] == compiled[2]
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]
