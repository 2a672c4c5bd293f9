"""Faults that voice conversion on a frozen codec invites, each with what must hold instead.

The comments name the fault; the tests run on every registered strategy where it could appear.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_codec import small, tone
from torch import Tensor, nn
from toy_strategies import Gain, Shift, learned, speakers

from snac_core import ConditionedCodec, Conditioning, UserError, discover, load_speaker_encoder
from snac_core.discriminators import Discriminators
from snac_core.film import FiLM
from snac_core.losses import margin_ranking
from snac_core.speakers.sampling import SpeakerSampler, SpeakerTable
from snac_core.step import Step
from snac_core.testing import Fixtures, small_codec
from snac_core.testing.fixtures import speech_like
from snac_core.testing.probes import flows, gradients, perturbed
from snac_core.testing.trial import hooks_of

CATALOGUE = discover()
PLACEMENTS = [n for n in CATALOGUE.strategies if {"before_vq", "after_vq"} & set(hooks_of(CATALOGUE.strategies[n]))]
LOSSES = [n for n in CATALOGUE.strategies if "loss" in hooks_of(CATALOGUE.strategies[n])]
ABOUT_THEMSELVES = [  # adapters whose terms are about their own edit; a `path` that can be off makes an objective
    n for n in PLACEMENTS if n in LOSSES and "path" not in CATALOGUE.strategies[n].Config.model_fields
]
DISCRIMINATORS = [n for n in CATALOGUE.strategies if "discriminator_loss" in hooks_of(CATALOGUE.strategies[n])]
SPEAKER_DIM = 16


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    return Fixtures(small_codec(), SPEAKER_DIM)


def arm(fixtures: Fixtures, *names: str, **config: dict[str, Any]) -> ConditionedCodec:
    """A model with every parameter away from its initial value."""
    model = ConditionedCodec(
        fixtures.codec, list(dict.fromkeys(names)), speaker_dim=SPEAKER_DIM, config=config, plugins=CATALOGUE
    )
    context = fixtures.context(model)
    for _, training_start in model.callers("training_start"):
        training_start(context=context)
    return perturbed(model, seed=0).train()


def terms(model: ConditionedCodec, step: Step, strategy: str, hook: str = "loss") -> dict[str, Tensor]:
    return next(call(step=step) for name, call in model.callers(hook) if name == strategy)


# -------------------------------------------------------------------- objective and gradient


# No gradient reaches a strategy from a conditioning encoder under no_grad on generated audio, terms through integer
# codes, a content loss between code indices, or an adversary on code indices.
@pytest.mark.parametrize(
    ("adapter", "objective"), [(p, o) for p in PLACEMENTS for o in LOSSES if p == o or o not in ABOUT_THEMSELVES]
)
def test_every_loss_term_reaches_every_placement_and_nothing_frozen(
    fixtures: Fixtures, adapter: str, objective: str
) -> None:
    try:
        model = arm(fixtures, adapter, objective)
    except UserError as refusal:  # what cannot reach the adapter says so before training
        if objective not in str(refusal) or adapter not in str(refusal):
            raise
        return
    for name, term in terms(model, fixtures.step(model), objective).items():
        reached = gradients(model, term)[adapter]
        assert any(flows(grad) for grad in reached.values()), f"{objective}/{name} does not reach {adapter}"
        term.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in model.codec.parameters())
    assert all(parameter.grad is None for parameter in fixtures.speaker_encoder.parameters())


def test_the_speaker_loss_lowers_itself_through_the_speaker_encoder_and_the_quantizer(fixtures: Fixtures) -> None:
    for adapter in ("phase3_contrastive", "phase4_decoder_film", "phase6_encoder_adapter"):
        model = arm(fixtures, adapter, "voice_conversion")
        losses = []
        for _ in range(12):
            loss = terms(model, fixtures.step(model), "voice_conversion")["spk_vc"]
            losses.append(float(loss.detach()))
            table = gradients(model, loss)[adapter]
            with torch.no_grad():
                for name, parameter in model.attached[adapter].named_parameters():
                    if (grad := table[name]) is not None:
                        parameter.sub_(3e-3 * grad.sign())
        assert min(losses[-3:]) < losses[0], adapter


# Decoding an adapter's output from integer codes gives it exactly zero gradient, and so does another embedding on them.
@pytest.mark.parametrize("kind", ["conv", "film"])
def test_an_adapter_before_vq_learns_from_identity_and_conversion(fixtures: Fixtures, kind: str) -> None:
    model = arm(fixtures, "phase6_encoder_adapter", phase6_encoder_adapter={"adapter_type": kind})
    step = fixtures.step(model)
    for audio in (step.identity.audio, step.converted.audio):
        assert all(flows(grad) for grad in gradients(model, audio.square().mean())["phase6_encoder_adapter"].values())


def test_decoding_the_same_codes_for_another_speaker_is_refused_where_it_could_teach_nothing() -> None:
    model = learned(Shift)
    codes = model.encode(tone(), speakers(2))
    assert not any(level.is_floating_point() for level in codes)
    with pytest.raises(UserError, match="no effect on decode"):
        model.decode(codes, speakers(2))


def test_negatives_reach_an_adapter_before_vq(fixtures: Fixtures) -> None:
    names = ("phase6_encoder_adapter", "phase3_contrastive")
    for form in ("infonce", "margin"):
        model = arm(fixtures, *names, phase3_contrastive={"path": False, "form": form, "margin": 2.5})
        loss = terms(model, fixtures.step(model), "phase3_contrastive")["contrastive"]
        assert all(flows(grad) for grad in gradients(model, loss)["phase6_encoder_adapter"].values()), form


# With an unseeded random projection behind the encoder, the embeddings of two processes have nothing in common.
def test_an_embedding_depends_on_the_audio_alone_and_keeps_its_encoders_dimension() -> None:
    audio, embeddings = speech_like(16000, 1.7, rows=1), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoder = load_speaker_encoder("ge2e")
        embeddings.append(encoder(audio, 16000))
        model = ConditionedCodec(small(), [Shift], speaker_encoder=encoder)
        assert model.encoder is not None
        assert model.encoder.dim == encoder.dim == embeddings[0].shape[1]
        assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"codec", "strategies"}
    assert torch.equal(*embeddings)


# A projection in the optimizer, with targets that are not detached, can be trained to agree with itself.
def test_nothing_that_measures_can_be_trained(fixtures: Fixtures) -> None:
    model = arm(fixtures, *PLACEMENTS, *LOSSES)
    step = fixtures.step(model)
    trained = {id(parameter) for _, parameter in model.trained_parameters()}
    trained |= {id(parameter) for _, parameter in model.discriminator_parameters()}
    assert not trained & {id(p) for module in (fixtures.speaker_encoder, model.codec) for p in module.parameters()}
    for reference in (step.own_reference, step.target_reference, step.own.speaker, step.target.speaker):
        assert not reference.requires_grad


# relu(negative - positive + margin) of distances pulls towards negatives and away from the target.
def test_the_hinge_punishes_sounding_like_a_negative_and_not_sounding_like_the_target() -> None:
    target, other = torch.eye(2)[:1], torch.eye(2)[1:].unsqueeze(1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert margin_ranking(target, target, other, mask, margin=0.1) == 0
    assert margin_ranking(other[:, 0], target, other, mask, margin=0.1) == pytest.approx(1.1)


# Negatives counted over the whole batch go to its first items; a flat list slips by one whenever a pair is skipped.
def test_every_item_gets_its_own_negatives_whatever_is_skipped_before_it() -> None:
    reference = nn.functional.normalize(torch.randn(5, 8), dim=1)
    reference[3] = reference[4] = reference[2]  # under the target 2, only speakers 0 and 1 are left
    sampler = SpeakerSampler(SpeakerTable(tuple("abcde"), reference, reference, "digest"), seed=0)
    anchors, targets = torch.tensor([0, 1, 0, 0]), torch.tensor([2, 0, 1, 1])
    rows = sampler.negatives(anchors, targets, 1, 6)
    assert rows.shape == (4, 6)
    assert set(rows[0].tolist()) == {1}
    assert bool((rows >= 0).all())
    two = SpeakerTable(("a", "b"), reference[:2], reference[:2], "digest")
    assert bool((SpeakerSampler(two, 0).negatives(torch.tensor([0]), torch.tensor([1]), 1, 3) == -1).all())


def test_every_converted_item_is_taught_by_its_negatives(fixtures: Fixtures) -> None:
    model = arm(fixtures, "phase3_contrastive")
    step = fixtures.step(model)
    loss = terms(model, step, "phase3_contrastive")["contrastive"]
    (grad,) = torch.autograd.grad(loss, step._embeddings)
    assert bool((grad[len(step.audio) :].abs().sum(1) > 0).all())


# The hardest negative is the same speaker under another label, or the anchor itself.
def test_the_same_voice_under_another_label_is_never_a_negative() -> None:
    reference = nn.functional.normalize(torch.randn(6, 8), dim=1)
    reference[5] = nn.functional.normalize(reference[1] + 0.05 * torch.randn(8), dim=0)
    sampler = SpeakerSampler(SpeakerTable(tuple("abcdef"), reference, reference, "digest"), seed=0)
    drawn = sampler.negatives(torch.zeros(200, dtype=torch.long), torch.ones(200, dtype=torch.long), 1, 4)
    assert set(drawn.flatten().tolist()) == {2, 3, 4}


# An adversary of the identity path alone gets no conversion; discriminators with equal windows and hops are redundant.
@pytest.mark.parametrize("strategy", DISCRIMINATORS)
def test_an_adversary_hears_converted_speech(fixtures: Fixtures, strategy: str) -> None:
    model = arm(fixtures, "phase6_encoder_adapter", strategy)
    with model.codec.fixed_noise(0):
        one, other = (terms(model, fixtures.step(model, index), strategy, "discriminator_loss") for index in (1, 2))
    assert any(not torch.isclose(value, other[name]) for name, value in one.items()), "other targets, other sound"


def test_discriminators_differ_in_window_hop_and_period() -> None:
    discriminators = list(Discriminators().discriminators)
    looks = [
        (type(discriminator), getattr(discriminator, "period", None), getattr(discriminator, "n_fft", None))
        for discriminator in discriminators
    ]
    assert len(set(looks)) == len(looks) == 8


# To ask for the source from output under another speaker's embedding teaches to ignore the embedding.
def test_only_output_under_the_own_embedding_is_compared_with_the_source(fixtures: Fixtures) -> None:
    model = arm(fixtures, "phase4_decoder_film", "voice_conversion")
    with model.codec.fixed_noise(0):
        one, other = fixtures.step(model, index=1), fixtures.step(model, index=2)
        assert not torch.equal(one.target_ids, other.target_ids)
        first, second = (terms(model, step, "voice_conversion") for step in (one, other))
    torch.testing.assert_close(first["recon"], second["recon"])
    torch.testing.assert_close(first["spk_id"], second["spk_id"])
    assert not torch.isclose(first["spk_vc"], second["spk_vc"])


# -------------------------------------------------------------------- model


# A conditioned decoder with weights of its own beside the pretrained one starts from noise.
@pytest.mark.parametrize("adapter", PLACEMENTS)
def test_conditioned_output_comes_from_the_pretrained_weights(adapter: str) -> None:
    audio, outputs = tone(samples=2000), []
    for codec in (small(), small()):
        model = ConditionedCodec(codec, [adapter], speaker_dim=SPEAKER_DIM, plugins=CATALOGUE)
        cond = Conditioning(nn.functional.normalize(torch.randn(2, SPEAKER_DIM), dim=1))
        with codec.fixed_noise(0):
            outputs.append(model.reconstruct(audio, cond).audio)
            assert torch.equal(outputs[-1], codec(audio)[0])
        assert model.codec is codec
    assert not torch.equal(*outputs)


# train() on what holds a frozen conditioning encoder puts its batch norms in train mode, and their statistics drift.
@pytest.mark.filterwarnings("ignore:speaker encoder 'simple' is UNTRAINED")
def test_a_frozen_encoders_statistics_never_move() -> None:
    encoder = load_speaker_encoder("simple")
    assert any(isinstance(module, nn.BatchNorm1d) for module in encoder.modules()), "or this shows nothing"
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    nn.ModuleList([encoder]).train()
    for _ in range(3):
        encoder(speech_like(16000, 0.5, rows=2), 16000)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


# Dropout in the conditioning path makes a new strategy random.
@pytest.mark.parametrize("adapter", PLACEMENTS)
def test_a_new_strategy_in_train_mode_changes_nothing_and_nothing_random(adapter: str) -> None:
    codec, audio = small(), tone(samples=500)
    model = ConditionedCodec(codec, [adapter], speaker_dim=SPEAKER_DIM, plugins=CATALOGUE).train()
    cond = Conditioning(nn.functional.normalize(torch.randn(2, SPEAKER_DIM), dim=1))
    with codec.fixed_noise(0):
        assert torch.equal(model.reconstruct(audio, cond).audio, codec(audio)[0])
        assert torch.equal(model.reconstruct(audio, cond).audio, codec(audio)[0])


# Weight decay pulls a scale that is kept as 1 to 0.
def test_weight_decay_pulls_an_affine_edit_towards_doing_nothing() -> None:
    film, x, s = FiLM(4, 3), torch.randn(2, 3, 5), torch.randn(2, 4)
    with torch.no_grad():
        for parameter in film.parameters():
            parameter.normal_()
        before = film(x, s) - x
        for parameter in film.parameters():
            parameter.mul_(0.5)  # what decay does
        torch.testing.assert_close(film(x, s) - x, 0.5 * before)


# A zero vector for "no speaker" is like no embedding that an encoder gives.
def test_no_embedding_is_the_bare_codec_and_not_a_zero_vector() -> None:
    model, audio = learned(Shift, Gain), tone()
    with model.codec.fixed_noise(0):
        assert torch.equal(model(audio)[0], model.codec(audio)[0])
    with pytest.raises(UserError, match="has the norm 0; expected 1"):
        model(audio, torch.zeros(2, 6))


# Attention to a single key is a constant bias: the speaker shifts every signal alike.
@pytest.mark.parametrize("adapter", ["phase3_contrastive", "phase4_decoder_film", "phase6_encoder_adapter"])
def test_what_a_speaker_changes_depends_on_what_is_said(fixtures: Fixtures, adapter: str) -> None:
    model = arm(fixtures, adapter).eval()
    edit = next(edit for edits in model.edits.values() for edit in edits)
    one, other = (fixtures.conditioning(1, first) for first in (0, 1))
    said = torch.randn(2, edit.tap.channels, 40)
    change = edit(said, one.expand(2)) - edit(said, other.expand(2))
    assert not torch.allclose(change[0], change[1], atol=1e-3)
    assert float(change[0].detach().std(dim=-1).max()) > 1e-3, "and it is not the same at every frame"
