"""Ours against the `snac` package: the same weights give the same codes and the same audio."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

from snac_core.codec import PRESETS, SNAC

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream scripts a function in a way that torch deprecates
    upstream = pytest.importorskip("snac")

# one thread: on a machine that is busy with other things, several wait for each other most of the time

NARROW = {"encoder_dim": 4, "decoder_dim": 32, "codebook_size": 64}
NARROW_ATTENTIVE = {"encoder_dim": 8, "decoder_dim": 128, "codebook_size": 64}  # heads are 64 channels wide


def pair(preset: str, **changes: object) -> tuple[torch.nn.Module, SNAC]:
    """Upstream's model and ours, with upstream's random weights."""
    config = {**PRESETS[preset], **changes}
    theirs = upstream.SNAC(**config).eval()
    for parameter in theirs.parameters():  # away from the initial values, where mistakes could hide
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = SNAC(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours.eval()


def narrow(preset: str) -> dict[str, object]:
    return NARROW if PRESETS[preset]["attn_window_size"] is None else NARROW_ATTENTIVE


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("batch", "samples"), [(1, 1), (3, 12_345), (2, 40_001)])
@torch.no_grad()
def test_codes_and_audio_agree_at_odd_lengths_and_batch_sizes(preset: str, batch: int, samples: int) -> None:
    theirs, ours = pair(preset, **narrow(preset))
    audio = torch.randn(batch, 1, samples) * 0.3
    torch.manual_seed(5)
    expected, expected_codes = theirs(audio)
    torch.manual_seed(5)
    got, codes = ours(audio)
    assert all(torch.equal(a, b) for a, b in zip(codes, expected_codes, strict=True))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-5
    torch.manual_seed(6)
    expected = theirs.decode(expected_codes)
    torch.manual_seed(6)
    got = ours.decode(codes)
    assert got.shape == expected.shape, "decode leaves the padding, as upstream does"
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("preset", ["snac_24khz", "snac_44khz"])
@torch.no_grad()
def test_the_released_configurations_agree_at_full_size(preset: str) -> None:
    assert PRESETS["snac_32khz"] == {**PRESETS["snac_44khz"], "sampling_rate": 32000}, "one size stands for both"
    theirs, ours = pair(preset)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    audio = torch.randn(1, 1, 5_000) * 0.3
    torch.manual_seed(5)
    expected, expected_codes = theirs(audio)
    torch.manual_seed(5)
    got, codes = ours(audio)
    assert all(torch.equal(a, b) for a, b in zip(codes, expected_codes, strict=True))
    assert (got - expected).abs().max() < 1e-5
    torch.manual_seed(5)
    got, codes = ours.freeze()(audio)
    assert all(torch.equal(a, b) for a, b in zip(codes, expected_codes, strict=True))
    assert (got - expected).abs().max() < 1e-5


def test_the_24_khz_model_has_the_published_size() -> None:
    assert sum(p.numel() for p in SNAC.from_config("snac_24khz").parameters()) == 19_842_914


def test_the_default_arguments_are_upstreams() -> None:
    ours = inspect.signature(SNAC.__init__).parameters
    theirs = inspect.signature(upstream.SNAC.__init__).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        default = tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
        assert ours[name].default == default, name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_codec_has_the_initial_values_that_upstream_draws(preset: str) -> None:
    torch.manual_seed(1)
    ours = SNAC(**{**PRESETS[preset], **narrow(preset)})
    torch.manual_seed(1)
    theirs = upstream.SNAC(**{**PRESETS[preset], **narrow(preset)})
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_of_audio_and_parameters_agree(preset: str) -> None:
    theirs, ours = pair(preset, **narrow(preset))
    audio = torch.randn(2, 1, 5_000) * 0.3
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        x = audio.clone().requires_grad_()
        model(x)[0].square().sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({"audio": x.grad, **named})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max()
        assert (gradients[1][name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name
