"""What each objective asks for: of which output, under which embedding, against what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snac_core import ConditionedCodec, Conditioning, UserError, discover
from snac_core.conditioned import Latents, Reconstruction
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.step import Step
from snac_core.taps import Tap, Taps
from snac_core.testing import Fixtures, small_codec

CATALOGUE = discover()
SPEAKER_DIM, TARGETS = 16, 2


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    return Fixtures(small_codec(), SPEAKER_DIM)


def step_of(
    fixtures: Fixtures, objective: str, index: int = 1, adapter: str = "phase4_decoder_film", **config: Any
) -> Step:
    """A step of an adapter and an objective, three items with two targets each."""
    model = ConditionedCodec(
        fixtures.codec,
        [adapter, objective],
        speaker_dim=SPEAKER_DIM,
        config={objective: config},
        plugins=CATALOGUE,
    )
    for _, start in model.callers("training_start"):
        start(context=fixtures.context(model))
    speakers = torch.arange(len(fixtures.audio))
    targets = fixtures.sampler.targets(speakers, index, TARGETS)
    return Step(
        model, fixtures.audio, sample_rate=16000, speaker_ids=speakers, target_ids=targets,
        speaker_encoder=fixtures.speaker_encoder, sampler=fixtures.sampler, index=index,
    )  # fmt: skip


def loss_of(step: Step) -> dict[str, Tensor]:
    """The terms of the step's last strategy."""
    found: dict[str, Tensor] = step.model.callers("loss")[-1][1](step=step)
    return found


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Conditioning]]:
    """What passes the path while the test runs: (audio, conditioning) of every call."""
    calls: list[tuple[Tensor, Conditioning]] = []
    path = ConditionedCodec.reconstruct

    def listening(model: ConditionedCodec, audio: Tensor, cond: Conditioning, **more: Any) -> Reconstruction:
        calls.append((audio, cond))
        return path(model, audio, cond, **more)

    monkeypatch.setattr(ConditionedCodec, "reconstruct", listening)
    return calls


# -------------------------------------------------------------------- synthetic conversion


def test_synthetic_conversion_goes_from_another_voice_under_the_own_embedding_to_the_original(
    fixtures: Fixtures, heard: list[tuple[Tensor, Conditioning]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(fixtures, "synthetic_vc", probability=1.0)
    loss_of(step)
    ((audio, cond),) = heard
    own = step.own.speaker
    order = [int((own == row).all(1).nonzero()) for row in cond.speaker]
    assert sorted(order) == [0, 1, 2], "every item once, each under its own speaker"
    assert not torch.isclose(audio, step.audio[order]).all(dim=2).any(), "another voice than the original"

    def perfect(_model: ConditionedCodec, _audio: Tensor, _cond: Conditioning) -> Reconstruction:
        return Reconstruction(step.audio[order], step.audio, step.audio, [])

    monkeypatch.setattr(ConditionedCodec, "reconstruct", perfect)
    found = loss_of(step)
    assert float(found["recon"]) == 0, "the target is the original"
    embedding = fixtures.speaker_encoder(step.audio, 16000)
    expected = 1 - torch.nn.functional.cosine_similarity(embedding, step.own_reference)
    torch.testing.assert_close(found["spk_synth"], expected.mean())


def test_synthetic_voices_depend_on_seed_and_step_alone(
    fixtures: Fixtures, heard: list[tuple[Tensor, Conditioning]]
) -> None:
    for index in (1, 1, 2):
        torch.manual_seed(len(heard))
        loss_of(step_of(fixtures, "synthetic_vc", index))
    one, same, other = (audio for audio, _ in heard)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("probability", "rows"), [(0.01, 1), (0.5, 2), (1.0, 3)])
def test_a_share_of_the_batch_is_made_into_other_voices(
    fixtures: Fixtures, heard: list[tuple[Tensor, Conditioning]], probability: float, rows: int
) -> None:
    loss_of(step_of(fixtures, "synthetic_vc", probability=probability))
    assert [len(audio) for audio, _ in heard] == [rows]


@pytest.mark.parametrize("kind", ["semitones", "formants", "equaliser_db"])
def test_each_kind_of_change_can_be_had_alone(
    fixtures: Fixtures, heard: list[tuple[Tensor, Conditioning]], kind: str
) -> None:
    nothing = {"semitones": (), "formants": (), "equaliser_db": 0.0}
    alone = {**nothing, kind: 6.0 if kind == "equaliser_db" else (0.2,)}
    step = step_of(fixtures, "synthetic_vc", probability=1.0, **nothing)
    loss_of(step)
    loss_of(step_of(fixtures, "synthetic_vc", probability=1.0, **alone))
    untouched, changed = (audio for audio, _ in heard)
    assert {tuple(row) for row in untouched[:, 0].tolist()} == {tuple(row) for row in step.audio[:, 0].tolist()}
    assert not torch.isclose(changed, untouched, atol=1e-4).all(dim=2).any()


# -------------------------------------------------------------------- content


def test_the_cycle_converts_the_converted_back_to_the_source_speaker(
    fixtures: Fixtures, heard: list[tuple[Tensor, Conditioning]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(fixtures, "content")
    loss_of(step)
    audio, cond = heard[-1]
    assert torch.equal(audio, step.converted.audio)
    assert torch.equal(cond.speaker, step.own.speaker.repeat(TARGETS, 1))

    def perfect(_model: ConditionedCodec, _audio: Tensor, _cond: Conditioning) -> Reconstruction:
        return Reconstruction(step.audio.repeat(TARGETS, 1, 1), step.audio, step.audio, [])

    monkeypatch.setattr(ConditionedCodec, "reconstruct", perfect)
    assert float(loss_of(step)["cycle"]) == 0


def test_parallel_speech_is_what_a_conversion_is_compared_with(fixtures: Fixtures) -> None:
    step = step_of(fixtures, "content", cycle=False, parallel=True)
    with pytest.raises(UserError, match="no two speakers of this data say the same words"):
        loss_of(step)
    perfect, length = step.converted.audio.detach(), step.audio.shape[-1]
    for recorded, known, low in ((perfect, 1, True), (perfect.flip(0), 1, False), (perfect.flip(0), 0, True)):
        step.__dict__["parallel"] = recorded, torch.full((len(recorded),), known * length)
        term = loss_of(step)["parallel"]
        assert bool(term < 0.01) == low
        assert term.requires_grad


# -------------------------------------------------------------------- contrastive


def negatives_of(step: Step) -> list[set[int]]:
    """The speakers that each output must not sound like."""
    speakers = step.model.attached["phase3_contrastive"]._negatives(step)[0]  # type: ignore[operator]
    return [set(row.tolist()) - {-1} for row in speakers]


def test_the_negatives_are_drawn_ones_the_batch_and_the_source_and_never_the_target(fixtures: Fixtures) -> None:
    step = step_of(fixtures, "phase3_contrastive", path=False, max_negatives=1)
    batch = set(step.speaker_ids.tolist()) | set(step.target_ids.tolist())
    sources = step.speaker_ids.repeat(TARGETS).tolist()
    for found, source, target in zip(negatives_of(step), sources, step.target_ids.tolist(), strict=True):
        assert target not in found
        assert source in found
        assert batch - {target} <= found
        assert len(found - batch) <= 1
    few = step_of(fixtures, "phase3_contrastive", path=False, batch_negatives=False, source_negative=False)
    for found, source, target in zip(negatives_of(few), sources, few.target_ids.tolist(), strict=True):
        assert not {source, target} & found


@pytest.mark.parametrize("form", ["infonce", "margin"])
def test_a_conversion_is_pulled_to_all_parts_of_its_target(fixtures: Fixtures, form: str) -> None:
    step = step_of(fixtures, "phase3_contrastive", path=False, form=form, margin=2.5)
    table = step.sampler.table
    draw = torch.Generator().manual_seed(3)
    parts = table.reference.unsqueeze(1) + 0.3 * torch.randn(len(table), 4, SPEAKER_DIM, generator=draw)
    object.__setattr__(table, "parts", torch.nn.functional.normalize(parts, dim=2))
    try:
        at = {}
        for name, goal in (
            ("part", table.positives(step.target_ids)[:, 2]),
            ("mean", step.target_reference),
            ("source", step.own_reference.repeat(TARGETS, 1)),
        ):
            vars(step)["_embeddings"] = torch.cat([step.own_reference, goal])
            at[name] = loss_of(step)["contrastive"]
    finally:
        object.__setattr__(table, "parts", None)
    assert max(at["part"], at["mean"]) < at["source"]


def test_what_conditions_is_no_positive(fixtures: Fixtures) -> None:
    """Or an arm under wrong embeddings, the control, would be taught to follow them."""
    losses = []
    for shift in (0, 1):
        step = step_of(fixtures, "phase3_contrastive", path=False)
        table = step.sampler.table
        rolled = replace(table, conditioning=table.conditioning.roll(shift, 0))
        step.sampler, before = SpeakerSampler(rolled, seed=0), step.sampler
        step.target = Conditioning(rolled.conditioning[step.target_ids])
        vars(step)["_embeddings"] = torch.cat([step.own_reference, before.table.reference[step.target_ids]])
        losses.append(float(loss_of(step)["contrastive"]))
    assert losses[0] == losses[1]


def test_nobody_counts_twice_among_the_negatives(fixtures: Fixtures) -> None:
    step = step_of(fixtures, "phase3_contrastive", path=False, max_negatives=12)
    for row in step.model.attached["phase3_contrastive"]._negatives(step)[0].tolist():
        found = [speaker for speaker in row if speaker >= 0]
        assert found
        assert len(set(found)) == len(found)


def test_without_a_path_the_contrastive_phase_edits_nothing_and_has_no_parameters(fixtures: Fixtures) -> None:
    model = step_of(fixtures, "phase3_contrastive", path=False).model
    assert set(model.edits) == {tap for tap in model.edits if tap.startswith("decoder_")}
    assert not list(model.attached["phase3_contrastive"].parameters())
    alone = ConditionedCodec(fixtures.codec, ["phase3_contrastive"], speaker_dim=SPEAKER_DIM, plugins=CATALOGUE)
    assert list(alone.edits) == ["quantized"]


# -------------------------------------------------------------------- adversaries


@pytest.mark.parametrize(("width", "period", "spectral"), [(1024, 41.1e6, 0.283e6), (256, 2.58e6, 0.019e6)])
def test_discriminators_are_as_wide_as_the_decoder(width: int, period: float, spectral: float) -> None:
    taps = Taps(SPEAKER_DIM, (Tap("quantized", 8, 50.0), Tap("decoder_0", width, 50.0)))
    cls = CATALOGUE.strategies["adversarial"]
    discriminators = list(cls(cls.Config(), taps).discriminator.discriminators)
    sizes = [sum(p.numel() for p in discriminator.parameters()) for discriminator in discriminators]
    assert sum(sizes[:5]) == pytest.approx(period, rel=0.01)
    assert sum(sizes[5:]) == pytest.approx(spectral, rel=0.01)


def test_an_adversarys_gradient_rises_with_the_steps_and_its_value_stays_raw(fixtures: Fixtures) -> None:
    step = step_of(fixtures, "adversarial", warmup_steps=4)
    outputs = step.identity.audio.detach().requires_grad_(True)
    step.__dict__["_outputs"] = (Reconstruction(outputs, outputs, outputs, []),) * 2
    found = []
    for step.index in (1, 3, 4, 9):
        term = loss_of(step)["adv"]
        found.append((float(term.detach()), torch.autograd.grad(term, outputs)[0]))
    for (value, grad), share in zip(found, (0.25, 0.75, 1.0, 1.0), strict=True):
        assert value == found[-1][0]
        torch.testing.assert_close(grad, share * found[-1][1])


def test_discriminators_learn_from_their_own_terms_alone(fixtures: Fixtures) -> None:
    for name in ("adversarial", "codebook_adversary"):
        step = step_of(fixtures, name, adapter="phase6_encoder_adapter")
        discriminator = [parameter for _, parameter in step.model.discriminator_parameters()]
        torch.stack(list(loss_of(step).values())).sum().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is None for parameter in discriminator)
        own = [parameter for _, parameter in step.model.trained_parameters()]
        assert any(parameter.grad is not None for parameter in own)
        for parameter in own:
            parameter.grad = None
        found: dict[str, Tensor] = step.model.callers("discriminator_loss")[-1][1](step=step)
        torch.stack(list(found.values())).sum().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is None for parameter in own)
        assert all(parameter.grad is not None for parameter in discriminator)


def test_a_codebook_adversary_turns_the_gradient_round(fixtures: Fixtures) -> None:
    step = step_of(fixtures, "codebook_adversary", adapter="phase6_encoder_adapter")
    z_q = step.converted_latents.z_q.detach().requires_grad_(True)
    both = torch.cat([step.identity_latents.z_q.detach(), z_q])
    step.__dict__["_latents"] = Latents(both, both, [])
    (turned,) = torch.autograd.grad(loss_of(step)["speaker"], z_q)
    strategy: Any = step.model.attached["codebook_adversary"]
    sources = step.speaker_ids.repeat(TARGETS)
    (straight,) = torch.autograd.grad(torch.nn.functional.cross_entropy(strategy.discriminator(z_q), sources), z_q)
    assert bool(straight.abs().sum() > 0)
    torch.testing.assert_close(turned, -straight)


def test_a_codebook_adversary_refuses_an_arm_that_leaves_the_codes_alone(fixtures: Fixtures) -> None:
    with pytest.raises(UserError, match=r"phase4_decoder_film.*acts before the quantizer"):
        step_of(fixtures, "codebook_adversary")
