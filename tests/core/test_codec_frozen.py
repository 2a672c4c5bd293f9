"""Weight norm, folding and freezing: what is kept for speed is never seen in the state dict, the codes or a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_codec import PLAIN, small, tone
from torch import Tensor, nn

from snac_core.codec import SNAC
from snac_core.codec.layers import WNConv1d, WNConvTranspose1d


def state_of(codec: SNAC) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in codec.state_dict().items()}


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def heard(codec: SNAC, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad(), codec.fixed_noise(0):
        audio_hat, codes = codec(audio)
    return audio_hat, codes


@pytest.mark.parametrize(
    ("plain", "layer"),
    [
        (nn.Conv1d, lambda: WNConv1d(6, 4, 4, stride=2, padding=1)),
        (nn.ConvTranspose1d, lambda: WNConvTranspose1d(6, 4, stride=2)),
    ],
)
def test_weight_norm_is_torchs_in_names_initial_values_outputs_and_gradients(
    plain: Callable[..., nn.Module], layer: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(1)
    theirs = nn.utils.parametrizations.weight_norm(plain(6, 4, 4, stride=2, padding=1))
    torch.manual_seed(1)
    ours = layer()
    assert_equal_states(theirs.state_dict(), ours.state_dict())  # type: ignore[arg-type]
    x = torch.randn(2, 6, 10)
    for module in (theirs, ours):
        module(x).square().sum().backward()
    assert torch.equal(theirs(x), ours(x))
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_freezing_keeps_codes_audio_and_state_dict() -> None:
    codec, audio = small(attentive=True), tone()
    state, (expected, expected_codes) = state_of(codec), heard(codec, audio)
    assert codec.freeze() is codec
    got, codes = heard(codec, audio)
    assert_equal_states(codec.state_dict(), state)
    assert all(torch.equal(a, b) for a, b in zip(codes, expected_codes, strict=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_a_frozen_codec_stays_in_eval_mode_whatever_train_is_called_on() -> None:
    codec = small().freeze()
    model = nn.ModuleDict({"codec": codec, "other": nn.Dropout()}).train()
    assert model["other"].training
    assert not any(module.training for module in codec.modules())


def test_folding_one_of_two_copies_leaves_the_other_as_it_was() -> None:
    codec, audio = small(), tone()
    state, expected = state_of(codec), heard(codec, audio)[0]
    twin = copy.deepcopy(codec)
    twin.freeze()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal_states(codec.state_dict(), state)
    assert torch.equal(heard(codec, audio)[0], expected)
    assert all(parameter.requires_grad for parameter in codec.parameters())


def test_a_copy_of_a_frozen_codec_is_frozen_and_sounds_the_same() -> None:
    codec, audio = small().freeze(), tone()
    twin = copy.deepcopy(codec)
    assert torch.equal(heard(twin, audio)[0], heard(codec, audio)[0])
    assert not twin.train().training


def test_weights_loaded_into_a_frozen_codec_are_the_ones_heard() -> None:
    codec, other, audio = small().freeze(), small(), tone()
    assert not torch.equal(heard(codec, audio)[0], heard(other, audio)[0])
    codec.load_state_dict(other.state_dict())
    torch.testing.assert_close(heard(codec, audio)[0], heard(other, audio)[0], rtol=0, atol=1e-6)


def test_a_frozen_codec_moves_to_another_dtype_and_back() -> None:
    codec, audio = small().freeze(), tone()
    expected = heard(codec, audio)[0]
    codec.double()
    assert {value.dtype for value in codec.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(heard(codec, audio.double())[0].float(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(heard(codec.float(), audio)[0], expected, rtol=0, atol=1e-6)


def test_a_codec_frozen_in_inference_mode_can_carry_gradients() -> None:
    codec = small()
    with torch.inference_mode():
        codec.freeze()
    audio = tone().requires_grad_()
    codec(audio)[0].sum().backward()
    assert audio.grad is not None
    assert audio.grad.abs().sum() > 0


def test_training_reaches_every_parameter_but_the_codebooks_and_lowers_a_loss() -> None:
    codec, audio = small().train(), tone(4)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with codec.fixed_noise(0):
            loss = (codec(audio)[0] - audio).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    silent = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [f"quantizer.quantizers.{level}.codebook.weight" for level in range(3)]
    assert losses[-1] < losses[0]


def test_parameters_that_train_again_are_used_in_place_of_what_was_folded() -> None:
    codec, audio = small().freeze(), tone()
    codec.decoder.requires_grad_(True)
    before = heard(codec, audio)[0]
    with torch.no_grad():
        for name, parameter in codec.decoder.named_parameters():
            if name.endswith("original0"):
                parameter *= 1.5
    assert not torch.equal(heard(codec, audio)[0], before)
    with codec.fixed_noise(0):
        codec(audio)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in codec.decoder.parameters())


def test_the_digest_tells_weights_and_configurations_apart_and_nothing_else() -> None:
    codec = small()
    digest = codec.digest
    assert len(digest) == 64
    assert codec.freeze().digest == digest
    twin = copy.deepcopy(codec)
    assert twin.digest == digest
    with torch.no_grad():
        next(twin.parameters()).view(-1)[0] += 1e-6
    assert twin.digest != digest
    twin.load_state_dict(codec.state_dict())
    assert twin.digest == digest
    faster = SNAC(**{**PLAIN, "sampling_rate": 8000})
    faster.load_state_dict(codec.state_dict())
    assert faster.digest != digest
    assert SNAC(**PLAIN).digest != SNAC(**PLAIN).digest, "random weights differ"


def test_the_digest_is_computed_once_while_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = small().freeze()
    digest = codec.digest
    monkeypatch.setattr("snac_core.codec.snac.tensor_digest", lambda *_: pytest.fail("computed again"))
    assert codec.digest == digest
