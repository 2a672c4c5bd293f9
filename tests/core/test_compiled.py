"""`SNAC.compile`, bfloat16, and the default length of chunks."""

from __future__ import annotations

import pytest
import torch
from small_codec import small
from torch import Tensor

from snac_core import SNAC, UserError
from snac_core.codec import kernels
from snac_core.codec.layers import WNConvTranspose1d
from snac_core.codec.streaming import EncoderStream, chunk_seconds
from snac_core.conditioned import ConditionedCodec


@pytest.fixture(scope="module")
def pair() -> tuple[SNAC, SNAC]:
    """A depthwise codec, and the same compiled."""
    torch.manual_seed(0)
    eager = small().freeze()
    compiled = SNAC(**eager.config)
    compiled.load_state_dict(eager.state_dict())
    state = torch.get_rng_state()
    compiled.compile()
    assert torch.equal(state, torch.get_rng_state()), "compiling draws no random numbers"
    return eager, compiled


def same(eager: SNAC, compiled: SNAC, audio: Tensor) -> None:
    expected, found = eager.encode(audio), compiled.encode(audio)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with eager.fixed_noise(0), compiled.fixed_noise(0):
        torch.testing.assert_close(compiled.decode(expected), eager.decode(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 240), (1, 1, 4800), (3, 1, 1200)])
def test_compiled_results_equal_eager_ones_for_every_length_and_batch(
    pair: tuple[SNAC, SNAC], shape: tuple[int, ...]
) -> None:
    with torch.no_grad():
        same(*pair, 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def test_the_kernels_run_where_no_gradient_is_needed(pair: tuple[SNAC, SNAC], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = kernels.depthwise_snake
    monkeypatch.setattr(kernels, "depthwise_snake", lambda *given: calls.append(1) or original(*given))
    eager, compiled = pair
    audio = 0.3 * torch.randn(1, 1, 240)
    compiled.encode(audio)
    assert len(calls) == 3 * len(eager.config["encoder_rates"]), "three residual units for each block"
    calls.clear()
    gradients = []
    for codec in pair:
        given = audio.clone().requires_grad_()
        codec.advance(codec.preprocess(given), None, "latent").square().sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert not calls
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("stride", [2, 3, 8])
def test_interleaved_phases_are_a_transposed_convolution(stride: int) -> None:
    layer = WNConvTranspose1d(4, 6, stride).requires_grad_(False)
    x = torch.randn(2, 4, 5)
    expected = layer(x)
    assert expected.shape == (2, 6, 5 * stride)
    layer.compiled = True
    layer.fold()
    torch.testing.assert_close(layer(x), expected)
    layer.parametrizations["weight"].original0.mul_(2)
    layer.double()  # moving a layer folds it again
    torch.testing.assert_close(layer(x.double()), super(WNConvTranspose1d, layer).forward(x.double()))


def test_compiling_freezes_and_keeps_the_state_dict(pair: tuple[SNAC, SNAC]) -> None:
    eager, compiled = pair
    assert not compiled.training
    assert compiled.digest == eager.digest
    assert not any(parameter.requires_grad for parameter in compiled.parameters())


def test_without_a_compiler_compile_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(kernels, "snake", fails)
    with pytest.raises(UserError, match=r"C\+\+ compiler.*No working"):
        small().compile()


def test_bfloat16_computes_convolutions_only_and_returns_float32() -> None:
    codec = SNAC.from_pretrained("tiny").freeze()
    codes = [torch.randint(1024, (1, 8 * 4 // stride)) for stride in codec.vq_strides]
    with codec.fixed_noise(0):
        expected = codec.decode(codes)
        with codec.computing(autocast=torch.bfloat16):
            found = codec.decode(codes)
    assert found.dtype == torch.float32
    error = (found - expected).square().sum()
    assert 30 < float(10 * torch.log10(expected.square().sum() / error)) < 60


@pytest.mark.parametrize("name", ["tiny", "snac_24khz", "snac_44khz"])
def test_chunks_are_shorter_for_larger_activations(name: str) -> None:
    codec = SNAC.from_pretrained(name) if name == "tiny" else SNAC.from_config(name)
    seconds = chunk_seconds(codec)
    assert seconds == pytest.approx({"tiny": 10, "snac_24khz": 4.6, "snac_44khz": 4}[name], abs=0.1)
    stream = EncoderStream(ConditionedCodec(codec))
    assert stream.chunk * stream.context.unit / codec.sampling_rate == pytest.approx(seconds, abs=0.4)
