"""Code prediction: of which conversion, under which embedding, which codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core import ConditionedCodec, Conditioning, UserError, discover
from snac_core.augment import long_term_envelope
from snac_core.frozen import FrozenActivations
from snac_core.losses import code_entropy
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.step import Imitation, Step
from snac_core.testing import Fixtures, small_codec
from snac_core.testing.fixtures import ROWS

CATALOGUE = discover()
SPEAKER_DIM, TARGETS = 16, 2


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    return Fixtures(small_codec(), SPEAKER_DIM)


def step_of(fixtures: Fixtures, recordings: tuple[Tensor, Tensor] | None = None, **config: Any) -> Step:
    """A step of phase 6, three items with two targets each."""
    model = ConditionedCodec(
        fixtures.codec,
        ["phase6_encoder_adapter", "code_prediction"],
        speaker_dim=SPEAKER_DIM,
        config={"code_prediction": config},
        plugins=CATALOGUE,
    )
    speakers = torch.arange(len(fixtures.audio))
    return Step(
        model, fixtures.audio, sample_rate=16000, speaker_ids=speakers,
        target_ids=fixtures.sampler.targets(speakers, 1, TARGETS), speaker_encoder=fixtures.speaker_encoder,
        sampler=fixtures.sampler, index=1, parallel=lambda: recordings,
    )  # fmt: skip


def terms_of(step: Step) -> dict[str, Tensor]:
    found: dict[str, Tensor] = step.model.callers("loss")[-1][1](step=step)
    return found


def entropy(step: Step, z: Tensor, codes: list[Tensor]) -> float:
    frames = codes[0].shape[-1] * step.model.codec.vq_strides[0]
    return float(code_entropy(step.model.codec.quantizer, z[..., :frames], codes, temperature=0.1).mean().detach())


def test_identity_and_restored_want_the_codes_of_the_source_and_moved_those_of_the_other_voice(
    fixtures: Fixtures,
) -> None:
    step = step_of(fixtures)
    found = {name: float(term.detach()) for name, term in terms_of(step).items()}
    assert set(found) == {"identity", "moved", "restored"}
    objective: Any = step.model.attached["code_prediction"]
    codec, bare = step.model.codec, step.frozen_activations
    moved, disguised = (FrozenActivations(codec, audio) for audio in objective.other_voices(step))
    assert len({float(one.at("latent").norm()) for one in (bare, moved, disguised)}) == 3, "three voices"
    # a new adapter changes nothing
    assert found["identity"] == pytest.approx(entropy(step, bare.at("latent"), bare.codes))
    assert found["moved"] == pytest.approx(entropy(step, bare.at("latent"), moved.codes))
    assert found["restored"] == pytest.approx(entropy(step, disguised.at("latent"), bare.codes))


def test_moved_is_asked_for_under_the_embedding_of_the_other_voice(
    fixtures: Fixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(fixtures)
    objective: Any = step.model.attached["code_prediction"]
    asked: list[Tensor] = []
    path = ConditionedCodec.latents

    def listening(model: ConditionedCodec, audio: Tensor, cond: Any = None, **more: Any) -> Any:
        asked.append(torch.zeros(0) if cond is None else cond.speaker)
        return path(model, audio, cond, **more)

    monkeypatch.setattr(ConditionedCodec, "latents", listening)
    terms_of(step)
    moved, _ = objective.other_voices(step)
    embedding = fixtures.speaker_encoder(moved, 16000)
    assert any(speaker.shape == embedding.shape and torch.allclose(speaker, embedding) for speaker in asked)


def test_voices_that_are_not_moved_are_the_source(fixtures: Fixtures) -> None:
    step = step_of(fixtures, semitones=0.0, formants=0.0, equaliser_db=0.0)
    objective: Any = step.model.attached["code_prediction"]
    for voice in objective.other_voices(step):
        assert float((voice - step.audio).abs().max()) < 0.05


def test_an_imitated_voice_is_that_of_another_item_of_the_batch(fixtures: Fixtures) -> None:
    step = step_of(fixtures, imitate=True, equaliser_db=0.0)
    objective: Any = step.model.attached["code_prediction"]
    moved, disguised = objective.other_voices(step)
    assert disguised is moved
    distance = torch.cdist(*(long_term_envelope(x, step.sample_rate) for x in (moved, step.audio)))
    assert distance.argmin(1).tolist() == [(row - 1) % ROWS for row in range(ROWS)]
    assert set(terms_of(step)) == {"identity", "moved", "restored"}


def test_imitations_from_a_cache_give_the_terms_of_the_same_voices_without_another_pass(
    fixtures: Fixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(fixtures, imitate=True, equaliser_db=0.0)
    objective: Any = step.model.attached["code_prediction"]
    moved, _ = objective.other_voices(step)
    latent = FrozenActivations(step.model.codec, moved).at("latent")
    cached = step_of(fixtures, imitate=True)
    cached.imitations = [Imitation(latent, fixtures.speaker_encoder(moved, 16000))]
    cached.frozen_activations.at("latent")
    expected = {name: float(term.detach()) for name, term in terms_of(step).items()}

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed in a step")

    for place in (f"{type(objective).__module__}.imitate", f"{type(objective).__module__}.random_equalization"):
        monkeypatch.setattr(place, refused)
    monkeypatch.setattr(type(step.model.codec), "advance", refused)
    monkeypatch.setattr(type(fixtures.speaker_encoder), "embed", refused)
    assert {name: float(term.detach()) for name, term in terms_of(cached).items()} == pytest.approx(expected)


def test_two_imitations_are_converted_to_each_other(fixtures: Fixtures) -> None:
    step = step_of(fixtures, imitate=True)
    first, second = (torch.randn_like(step.frozen_activations.at("latent")) for _ in range(2))
    embeddings = torch.nn.functional.normalize(torch.randn(2, ROWS, SPEAKER_DIM), dim=-1)
    step.imitations = [Imitation(first, embeddings[0]), Imitation(second, embeddings[1])]
    codec = step.model.codec
    edited = step.model.latents(
        step.audio, Conditioning(embeddings[1]), frozen=FrozenActivations(codec, step.audio, latent=first)
    )
    expected = entropy(step, edited.z, codec.quantizer(second)[1])
    found = terms_of(step)
    assert float(found["crossed"].detach()) == pytest.approx(expected)
    assert set(found) == {"identity", "moved", "restored", "crossed"}


def test_imitations_at_the_latent_are_refused_by_edits_of_the_encoder(fixtures: Fixtures) -> None:
    step = step_of(fixtures, imitate=True)
    step.imitations = [Imitation(step.frozen_activations.at("latent"), step.own.speaker)]
    step.model = ConditionedCodec(
        fixtures.codec,
        ["phase6_encoder_adapter", "code_prediction"],
        speaker_dim=SPEAKER_DIM,
        config={"phase6_encoder_adapter": {"taps": ["encoder_1", "latent"]}, "code_prediction": {"imitate": True}},
        plugins=CATALOGUE,
    )
    with pytest.raises(UserError, match=r"edits 'encoder_1'; set imitations = 0"):
        terms_of(step)


def test_parallel_wants_the_codes_of_the_targets_recording(fixtures: Fixtures) -> None:
    audio = fixtures.audio
    recorded = audio.clone()
    recorded[0] = 0  # a target who says nothing
    recorded = torch.cat([recorded] * TARGETS)
    step = step_of(fixtures, (recorded, torch.full((len(recorded),), audio.shape[-1])), parallel=True)
    objective: Any = step.model.attached["code_prediction"]
    codes, there = objective.target_codes(step)
    assert bool((there == 1).all())
    assert [len(level) for level in codes] == [TARGETS * len(audio)] * len(codes)
    silence = step.model.codec.encode(torch.zeros_like(audio[:1]))
    for level, bare, silent in zip(codes, step.frozen_activations.codes, silence, strict=True):
        count = level.shape[-1]  # without the last ones, which are of padding
        assert float((level[1] == bare[1, :count]).float().mean()) > 0.8, "who said it himself says it again"
        assert float((level[0] == silent[0, :count]).float().mean()) > 0.8
    expected = entropy(step, step.converted_latents.z, codes)
    assert float(terms_of(step)["parallel"].detach()) == pytest.approx(expected)


def test_targets_without_a_recording_count_for_nothing(fixtures: Fixtures) -> None:
    audio = torch.cat([fixtures.audio] * TARGETS)
    lengths = torch.full((len(audio),), audio.shape[-1])
    whole = step_of(fixtures, (audio, lengths), parallel=True)
    none = lengths.clone()
    none[1:] = 0
    step = step_of(fixtures, (audio, none), parallel=True)
    objective: Any = whole.model.attached["code_prediction"]
    codes = [level[:1] for level in objective.target_codes(whole)[0]]
    expected = entropy(step, step.converted_latents.z[:1], codes) / len(audio)
    assert float(terms_of(step)["parallel"].detach()) == pytest.approx(expected), "the mean over all targets"
    for silent in (audio, torch.zeros(len(audio), 1, 1)):  # one sample is what the runner gives where nobody says it
        nothing = terms_of(step_of(fixtures, (silent, torch.zeros_like(lengths)), parallel=True))
        assert float(nothing["parallel"].detach()) == 0


def test_every_row_of_targets_has_the_codes_that_it_has_alone(fixtures: Fixtures) -> None:
    length = fixtures.audio.shape[-1]
    rows = [fixtures.audio[row % ROWS : row % ROWS + 1] * (1 + row) for row in range(ROWS * TARGETS)]
    lengths = torch.tensor([length - 300 * row for row in range(len(rows))])
    recorded = torch.cat([F.pad(wave[..., :n], (0, length - int(n))) for wave, n in zip(rows, lengths, strict=True)])
    step = step_of(fixtures, (recorded, lengths), parallel=True)
    objective: Any = step.model.attached["code_prediction"]
    codes, _ = objective.target_codes(step)
    for row in range(len(rows)):
        step.audio = fixtures.audio[row % ROWS : row % ROWS + 1]
        step.__dict__["parallel"] = (recorded[row : row + 1], lengths[row : row + 1])
        alone, _ = objective.target_codes(step)
        for level, one in zip(codes, alone, strict=True):
            assert torch.equal(level[row : row + 1], one)


def test_what_a_source_is_padded_with_has_no_codes_to_predict(fixtures: Fixtures) -> None:
    codec = fixtures.codec
    block = codec.hop_length * codec.vq_strides[0]
    step = step_of(fixtures, parallel=True)
    step.audio = step.audio[..., : 5 * block + 3]
    recorded = torch.cat([fixtures.audio] * TARGETS)
    step.__dict__["parallel"] = (recorded, torch.full((len(recorded),), recorded.shape[-1]))
    objective: Any = step.model.attached["code_prediction"]
    codes, _ = objective.target_codes(step)
    assert codes[0].shape[-1] == 5
    step.audio = step.audio[..., :7]
    assert objective.target_codes(step)[0][0].shape[-1] == 1


def test_a_shuffled_arm_is_taught_the_other_voices_under_wrong_embeddings(fixtures: Fixtures) -> None:
    step = step_of(fixtures)
    right = step.conditioning_of(step.audio).speaker
    torch.testing.assert_close(right, fixtures.speaker_encoder(step.audio, 16000))
    step.sampler = SpeakerSampler(replace(step.sampler.table, shuffled=True), 0)
    wrong = step.conditioning_of(step.audio).speaker
    assert not any(torch.allclose(a, b) for a, b in zip(right, wrong, strict=True))
    assert torch.equal(wrong, step.target.speaker[: len(wrong)]), "those of speakers that were drawn at random"


def test_speech_in_which_nobody_says_the_same_is_refused(fixtures: Fixtures) -> None:
    with pytest.raises(UserError, match="'code_prediction': no two speakers of this data say the same"):
        terms_of(step_of(fixtures, None, parallel=True))


def test_nothing_is_decoded(fixtures: Fixtures) -> None:
    step = step_of(fixtures)
    called: list[int] = []
    handle = fixtures.codec.decoder.model[0].register_forward_hook(lambda *_: called.append(1))
    try:
        sum(term for _, loss in step.model.callers("loss") for term in loss(step=step).values()).backward()  # type: ignore[union-attr]
    finally:
        handle.remove()
    assert not called


def test_an_arm_that_leaves_the_codes_alone_is_refused(fixtures: Fixtures) -> None:
    model = ConditionedCodec(
        fixtures.codec, ["phase4_decoder_film", "code_prediction"], speaker_dim=SPEAKER_DIM, plugins=CATALOGUE
    )
    start = dict(model.callers("training_start"))["code_prediction"]
    with pytest.raises(UserError, match=r"phase4_decoder_film.*acts before the quantizer"):
        start(context=fixtures.context(model))
