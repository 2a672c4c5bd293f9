"""A codec with strategies: what goes in, what comes out, and what stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_codec import small, tone
from torch import Tensor
from toy_strategies import SPEAKER_DIM, Gain, Shift, learned, speakers

from snac_core import SNAC, ConditionedCodec, Conditioning, UserError, load_speaker_encoder
from snac_core.conditioned import Reconstruction
from snac_core.frozen import FrozenActivations
from snac_core.testing.fixtures import speech_like


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: Reconstruction, b: Reconstruction) -> bool:
    return same(a.codes, b.codes) and torch.allclose(a.audio, b.audio, atol=1e-5)


# -------------------------------------------------------------------- with and without an embedding


@pytest.mark.parametrize("strategies", [(Shift,), (Gain,), (Shift, Gain), ()])
def test_without_an_embedding_it_is_the_bare_codec_bit_for_bit_also_when_trained(strategies: tuple[type, ...]) -> None:
    codec, audio = small(), tone(samples=241)
    bare = copy.deepcopy(codec)
    model = learned(*strategies, codec=codec).train()
    with codec.fixed_noise(1), bare.fixed_noise(1):
        expected, codes = bare(audio)
        got, got_codes = model(audio)
        reconstructed = model.reconstruct(audio)
        assert torch.equal(got, expected)
        assert torch.equal(reconstructed.audio, expected)
        assert same(got_codes, codes)
        assert same(reconstructed.codes, codes)
        assert same(model.encode(audio), codes)
        assert torch.equal(model.decode(codes), bare.decode(codes))
        assert torch.equal(model.decode(codes, length=200), bare.decode(codes, length=200))


def test_outside_fixed_noise_equal_seeds_give_the_bare_codecs_audio() -> None:
    model, audio = learned(Gain), tone()
    torch.manual_seed(4)
    expected = model.codec(audio)[0]
    torch.manual_seed(4)
    assert torch.equal(model(audio)[0], expected)


def test_new_strategies_on_both_sides_change_nothing() -> None:
    model, audio = ConditionedCodec(small(), [Shift, Gain], speaker_dim=SPEAKER_DIM), tone(samples=241)
    with model.codec.fixed_noise(1):
        out, bare = model.reconstruct(audio, Conditioning(speakers(2))), model.reconstruct(audio)
    assert torch.equal(out.audio, bare.audio)
    assert torch.equal(out.z, bare.z)
    assert same(out.codes, bare.codes)


def test_swapping_two_speakers_swaps_the_outputs() -> None:
    model, targets = learned(Shift, Gain), speakers(2)
    audio = tone(batch=1).repeat(2, 1, 1)
    with model.codec.fixed_noise(1):
        out = model.reconstruct(audio, Conditioning(targets))
        swapped = model.reconstruct(audio, Conditioning(targets.flip(0)))
    # close, not equal: vector instructions may round an item differently at another place of its batch
    assert torch.allclose(out.audio.flip(0), swapped.audio, atol=1e-5)
    assert not torch.allclose(out.audio[0], out.audio[1], atol=1e-2)


def test_an_items_output_does_not_depend_on_its_batch() -> None:
    model, audio, targets = learned(Shift, Gain), tone(batch=3), speakers(3)
    with model.codec.fixed_noise(1):
        together = model.reconstruct(audio, Conditioning(targets))
        for row in range(3):
            alone = model.reconstruct(audio[row : row + 1], Conditioning(targets[row]))
            assert close(alone, together[row : row + 1])


def test_the_two_sides_apart_are_the_whole() -> None:
    model, audio, target = learned(Shift, Gain), tone(samples=241), speakers(2)
    with model.codec.fixed_noise(1):
        codes = model.encode(audio, speaker_embedding=target)
        expected, expected_codes = model(audio, speaker_embedding=target)
        got = model.decode(codes, speaker_embedding=target, length=241)
    assert same(codes, expected_codes)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_codes_of_a_strategy_before_vq_need_nothing_more() -> None:
    model, audio, target = learned(Shift), tone(), speakers(1)
    with model.codec.fixed_noise(1):
        codes = model.encode(audio, target)
        assert not same(codes, model.encode(audio))
        audio_hat = model.decode(codes, length=audio.shape[-1])
        torch.testing.assert_close(audio_hat, model(audio, target)[0], atol=1e-5, rtol=0)


def test_a_strategy_after_vq_leaves_the_codes_alone() -> None:
    model, audio, target = learned(Gain), tone(), speakers(2)
    with model.codec.fixed_noise(1):
        out, codes = model(audio, target)
        assert same(codes, model.encode(audio))
        assert not torch.equal(out, model(audio)[0])


def test_a_reconstruction_holds_the_edited_latent_and_what_was_quantized() -> None:
    model, audio, target = learned(Shift, Gain), tone(samples=241), speakers(2)
    out = model.reconstruct(audio, Conditioning(target))
    latent = model.codec.advance(model.codec.preprocess(audio), None, "latent")
    shift = model.strategies["shift"].shifts["latent"](target).unsqueeze(-1)
    torch.testing.assert_close(out.z, latent + shift)
    torch.testing.assert_close(out.z_q, model.codec.quantizer.from_codes(out.codes), atol=1e-5, rtol=1e-5)
    assert out.audio.shape == audio.shape


def test_one_embedding_serves_every_item() -> None:
    model, audio, target = learned(Shift, Gain), tone(batch=3), speakers(1)
    with model.codec.fixed_noise(1):
        for given in (target, target[0], Conditioning(target), target.expand(3, -1)):
            torch.testing.assert_close(model(audio, given)[0], model(audio, target.expand(3, -1))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategies", [(Shift,), (Gain,), (Shift, Gain)])
def test_several_targets_of_every_item_are_rows_with_items_fastest(strategies: tuple[type, ...]) -> None:
    model, audio, targets = learned(*strategies), tone(batch=2), speakers(6)
    with model.codec.fixed_noise(1):
        out = model.reconstruct(audio, Conditioning(targets))
        assert out.audio.shape == (6, 1, audio.shape[-1])
        for copy_number in range(3):
            rows = slice(2 * copy_number, 2 * copy_number + 2)
            assert close(model.reconstruct(audio, Conditioning(targets[rows])), out[rows])


def test_a_shared_frozen_activations_changes_nothing_but_the_work() -> None:
    codec, audio, targets = small(), tone(), Conditioning(speakers(2))
    with codec.fixed_noise(1):
        bare = FrozenActivations(codec, audio)
        for strategies in ((Gain,), (Shift,), (Shift, Gain)):
            model = learned(*strategies, codec=codec)
            alone, shared = model.reconstruct(audio, targets), model.reconstruct(audio, targets, frozen=bare)
            assert torch.equal(alone.audio, shared.audio)
            assert torch.equal(alone.z, shared.z)
            assert torch.equal(model.reconstruct(audio, frozen=bare).audio, model.reconstruct(audio).audio)


# -------------------------------------------------------------------- gradient


def test_the_gradient_passes_the_quantizer_to_an_edit_before_it_and_nothing_frozen() -> None:
    model = learned(Shift, Gain)
    model.reconstruct(tone(), Conditioning(speakers(2))).audio.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for _, parameter in model.trained_parameters())
    assert all(parameter.grad is None for parameter in model.codec.parameters())


def test_a_second_pass_over_converted_audio_carries_the_gradient_back_through_the_encoder() -> None:
    model = learned(Shift)
    once = model.reconstruct(tone(), Conditioning(speakers(2)))
    again = model.reconstruct(once.audio)
    loss = again.audio.square().mean()
    assert torch.autograd.grad(loss, next(model.strategies.parameters()))[0].any()


def test_inference_mode_gives_the_same_audio() -> None:
    model, audio, target = learned(Shift, Gain), tone(), speakers(2)
    with model.codec.fixed_noise(1):
        expected = model(audio, target)[0]
        with torch.inference_mode():
            assert torch.equal(model(audio, target)[0], expected)


# -------------------------------------------------------------------- the base


def test_the_base_keeps_its_names_and_values_and_never_trains() -> None:
    codec = small()
    before = {key: value.clone() for key, value in codec.state_dict().items()}
    model = learned(Shift, Gain, codec=codec).train()
    parameters = [parameter for _, parameter in model.trained_parameters()]
    for _ in range(2):
        loss = model.reconstruct(tone(), Conditioning(speakers(2))).audio.abs().mean()
        with torch.no_grad():
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(0.1 * grad)
    model.train()
    after = model.codec.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not any(module.training for module in model.codec.modules())
    assert not any(parameter.requires_grad for parameter in model.codec.parameters())
    trained = {id(parameter) for _, parameter in model.trained_parameters()}
    assert not trained & {id(parameter) for parameter in model.codec.parameters()}


def test_a_deep_copy_shares_nothing() -> None:
    model, audio, target = learned(Shift, Gain), tone(), speakers(2)
    with model.codec.fixed_noise(1):
        expected = model(audio, target)[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.strategies.parameters():
            parameter.zero_()
    with model.codec.fixed_noise(1):
        assert torch.equal(model(audio, target)[0], expected)
    with twin.codec.fixed_noise(1):
        assert torch.equal(twin(audio, target)[0], twin(audio)[0])


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("strategies", "call", "words"),
    [
        ((Gain,), "encode", r"gain acts only after VQ, .*give it to decode\(codes, speaker_embedding"),
        ((Shift,), "decode", r"shift acts only before VQ, .*give it to encode\(audio, speaker_embedding"),
    ],
)
def test_an_embedding_that_cannot_act_is_refused_with_the_place_to_give_it(
    strategies: tuple[type, ...], call: str, words: str
) -> None:
    model, audio = learned(*strategies), tone()
    given = audio if call == "encode" else model.encode(audio)
    with pytest.raises(UserError, match=words):
        getattr(model, call)(given, speaker_embedding=speakers(2))


def test_an_embedding_for_a_model_that_edits_nothing_is_refused() -> None:
    model = ConditionedCodec(small())
    with pytest.raises(UserError, match="no effect"):
        model.encode(tone(), speakers(2))
    with pytest.raises(UserError, match="no effect"):
        model.decode(model.encode(tone()), speakers(2))


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (torch.randn(2, SPEAKER_DIM + 1), f"of {SPEAKER_DIM + 1} dimensions; .*'custom', which has {SPEAKER_DIM}"),
        (speakers(3), "3 speaker embeddings for a batch of 2"),
        (torch.randn(2, 1, SPEAKER_DIM), r"shape \(B, S\) or \(S,\); got \(2, 1, 6\)"),
        (torch.ones(2, SPEAKER_DIM, dtype=torch.long), "floating point; got torch.int64"),
    ],
)
def test_an_embedding_of_another_shape_is_refused(embedding: Tensor, words: str) -> None:
    model, audio = learned(Shift, Gain), tone()
    for call in (
        lambda: model(audio, embedding),
        lambda: model.encode(audio, embedding),
        lambda: model.decode(model.encode(audio), embedding),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_codes_take_one_target_each() -> None:
    model, audio = learned(Shift, Gain), tone()
    with pytest.raises(UserError, match="4 speaker embeddings for a batch of 2"):
        model.encode(audio, speakers(4))
    with pytest.raises(UserError, match="4 speaker embeddings for a batch of 2"):
        model.decode(model.encode(audio), speakers(4))


@pytest.mark.parametrize("length", [0, -3, 10_000])
def test_a_length_that_the_codes_do_not_hold_is_refused_with_an_embedding_too(length: int) -> None:
    model = learned(Gain)
    codes = model.encode(tone())
    with pytest.raises(UserError, match=f"length {length} "):
        model.decode(codes, speakers(2), length=length)


def test_codes_are_checked_with_an_embedding_too() -> None:
    model = learned(Gain)
    with pytest.raises(UserError, match="codes are 3 tensors"):
        model.decode(model.encode(tone())[:2], speakers(2))
    with pytest.raises(UserError, match="codes of level 0 are on meta, the codec on cpu"):
        model.decode([level.to("meta") for level in model.encode(tone())], speakers(2))


@pytest.mark.parametrize(("factor", "norm"), [(0.0, "0"), (100.0, "100"), (math.nan, "nan")])
def test_an_embedding_without_unit_norm_is_refused(factor: float, norm: str) -> None:
    model, target = learned(Shift, Gain), speakers(2)
    target[1] *= factor
    codes = model.encode(tone())
    for call in (model, model.encode, lambda _, cond: model.decode(codes, cond)):
        with pytest.raises(UserError, match=f"speaker embedding 1 of 2 has the norm {norm}; expected 1"):
            call(tone(), target)


def test_audio_that_is_no_tensor_is_refused_with_an_embedding_too() -> None:
    for call in (learned(Shift), learned(Shift).encode):
        with pytest.raises(UserError, match=r"audio is a tensor \(B, 1, T\); got list"):
            call([0.0, 1.0], speakers(1))  # type: ignore[arg-type]


def test_audio_that_is_not_finite_is_refused_with_an_embedding_too() -> None:
    model, audio = learned(Shift, Gain), tone()
    audio[1, 0, 3] = float("nan")
    for call in (model, model.encode):
        with pytest.raises(UserError, match="NaN or infinity in item 1"):
            call(audio, speakers(2))


def test_another_encoders_embedding_is_refused_by_digest() -> None:
    encoder = load_speaker_encoder("ge2e")
    model = ConditionedCodec(small(), [Shift], speaker_encoder=encoder)
    embedding = torch.nn.functional.normalize(torch.randn(2, encoder.dim), dim=1)
    model(tone(), Conditioning(embedding, encoder=encoder.digest))
    model(tone(), embedding)
    with pytest.raises(UserError, match=r"comes from another speaker encoder \(digest 0000.*'ge2e'"):
        model(tone(), Conditioning(embedding, encoder="0" * 64))


def test_an_embedding_alone_is_a_condition_everywhere() -> None:
    model, audio, target = learned(Shift, Gain), tone(), speakers(1)
    with model.codec.fixed_noise(0):
        expected = model.reconstruct(audio, Conditioning(target))
        found = model.reconstruct(audio, target)
    assert torch.equal(found.audio, expected.audio)
    assert torch.equal(model.latents(audio, target).z, expected.z)


@pytest.mark.parametrize(
    ("strategies", "options", "words"),
    [
        (["shfit"], {}, "unknown strategy 'shfit'; known: "),
        (["phase6"], {}, "unknown strategy 'phase6'; did you mean 'phase6_encoder_adapter'"),
        ([Shift, Gain, Shift], {}, "'shift' is listed twice"),
        ("phase6_encoder_adapter", {}, "expected a list, such as"),
        ({"phase6_encoder_adapter": {"hiddn": 2}}, {}, "and their settings as config="),
        ([type("Half", (Gain,), {"name": "half"})], {}, "'half': torch needs this name"),
        (
            [Shift],
            {"config": {"shift": {"strenght": 2}}},
            "unknown setting 'strenght' of 'shift'; did you mean 'strength'",
        ),
        ([Shift], {"config": {"shift": {"strength": -1}}}, "'shift': strength = -1: .*greater than 0"),
        ([Shift], {"config": {"shift": {"strength": "loud"}}}, "'shift': strength = 'loud'"),
        ([Shift], {"config": {"shift": Gain.Config()}}, "settings of 'shift' are a Strategy.Config"),
        ([Shift], {"config": {"gain": {}}}, r"settings for 'gain', which is not among \['shift'\]"),
        (
            [Shift],
            {"config": {"shift": {"taps": ["encodr_1"]}}},
            "'encodr_1' matches no tap .*did you mean 'encoder_1'",
        ),
        ([Shift], {"config": {"shift": {"taps": ["decoder_1"]}}}, "before_taps names 'decoder_1', .*not before VQ"),
        ([Shift], {"speaker_dim": None}, "strategies need speaker_encoder='ge2e'"),
        ([Shift], {"speaker_encoder": "ge2e"}, "speaker_dim 6 and 'ge2e', which has 256"),
        (
            [Shift],
            {"speaker_encoder": "g2e", "speaker_dim": None},
            "unknown speaker encoder 'g2e'; did you mean 'ge2e'",
        ),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(strategies: object, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ConditionedCodec(small(), strategies, **{"speaker_dim": SPEAKER_DIM, **options})
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------- by name, as in the documentation


def test_by_name_from_speech_to_converted_speech() -> None:
    codec = SNAC.from_pretrained("tiny")
    audio, reference = speech_like(codec.sampling_rate, 0.5, rows=2), speech_like(16000, 1.7, rows=2)
    encoder = load_speaker_encoder("ge2e")
    target = encoder(reference, sample_rate=16000)
    assert target.shape == (2, encoder.dim)
    torch.testing.assert_close(target.norm(dim=1), torch.ones(2))
    model = ConditionedCodec("tiny", strategies=["phase6_encoder_adapter"], speaker_encoder="ge2e")
    with model.codec.fixed_noise(1), codec.fixed_noise(1):
        audio_hat, codes = model(audio, speaker_embedding=target)
        assert torch.equal(audio_hat, codec(audio)[0])
    assert [tuple(level.shape) for level in codes] == [tuple(level.shape) for level in codec.encode(audio)]
    assert model.codec.name == "tiny"
    assert model.codec.digest == codec.digest
