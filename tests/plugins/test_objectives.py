"""What each objective asks for: of which output, under which embedding, against what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snac_core import ConditionedCodec, Conditioning, discover
from snac_core.conditioned import Reconstruction
from snac_core.step import Step
from snac_core.testing import Surroundings, small_codec

CATALOGUE = discover()
SPEAKER_DIM, TARGETS = 16, 2


@pytest.fixture(scope="module")
def surroundings() -> Surroundings:
    return Surroundings(small_codec(), SPEAKER_DIM)


def step_of(surroundings: Surroundings, objective: str, index: int = 1, **config: Any) -> Step:
    """A step of phase 4 and an objective, three items with two targets each."""
    names = ["phase4_decoder_film", objective]
    model = ConditionedCodec(
        surroundings.codec, names, speaker_dim=SPEAKER_DIM, config={objective: config}, plugins=CATALOGUE
    )
    speakers = torch.arange(len(surroundings.audio))
    targets = surroundings.sampler.targets(speakers, index, TARGETS)
    return Step(
        model, surroundings.audio, sample_rate=16000, speaker_ids=speakers, target_ids=targets,
        teacher=surroundings.teacher, sampler=surroundings.sampler, index=index,
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
    surroundings: Surroundings, heard: list[tuple[Tensor, Conditioning]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(surroundings, "synthetic_vc", probability=1.0)
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
    embedding = surroundings.teacher(step.audio, 16000)
    expected = 1 - torch.nn.functional.cosine_similarity(embedding, step.own_reference)
    torch.testing.assert_close(found["spk_synth"], expected.mean())


def test_synthetic_voices_depend_on_seed_and_step_alone(
    surroundings: Surroundings, heard: list[tuple[Tensor, Conditioning]]
) -> None:
    for index in (1, 1, 2):
        torch.manual_seed(len(heard))
        loss_of(step_of(surroundings, "synthetic_vc", index))
    one, same, other = (audio for audio, _ in heard)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("probability", "rows"), [(0.01, 1), (0.5, 2), (1.0, 3)])
def test_a_share_of_the_batch_is_made_into_other_voices(
    surroundings: Surroundings, heard: list[tuple[Tensor, Conditioning]], probability: float, rows: int
) -> None:
    loss_of(step_of(surroundings, "synthetic_vc", probability=probability))
    assert [len(audio) for audio, _ in heard] == [rows]


@pytest.mark.parametrize("kind", ["semitones", "formants", "equaliser_db"])
def test_each_kind_of_change_can_be_had_alone(
    surroundings: Surroundings, heard: list[tuple[Tensor, Conditioning]], kind: str
) -> None:
    nothing = {"semitones": (), "formants": (), "equaliser_db": 0.0}
    alone = {**nothing, kind: 6.0 if kind == "equaliser_db" else (0.2,)}
    step = step_of(surroundings, "synthetic_vc", probability=1.0, **nothing)
    loss_of(step)
    loss_of(step_of(surroundings, "synthetic_vc", probability=1.0, **alone))
    untouched, changed = (audio for audio, _ in heard)
    assert {tuple(row) for row in untouched[:, 0].tolist()} == {tuple(row) for row in step.audio[:, 0].tolist()}
    assert not torch.isclose(changed, untouched, atol=1e-4).all(dim=2).any()


# -------------------------------------------------------------------- content


def test_the_cycle_converts_the_converted_back_to_the_source_speaker(
    surroundings: Surroundings, heard: list[tuple[Tensor, Conditioning]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(surroundings, "content")
    loss_of(step)
    audio, cond = heard[-1]
    assert torch.equal(audio, step.converted.audio)
    assert torch.equal(cond.speaker, step.own.speaker.repeat(TARGETS, 1))

    def perfect(_model: ConditionedCodec, _audio: Tensor, _cond: Conditioning) -> Reconstruction:
        return Reconstruction(step.audio.repeat(TARGETS, 1, 1), step.audio, step.audio, [])

    monkeypatch.setattr(ConditionedCodec, "reconstruct", perfect)
    assert float(loss_of(step)["cycle"]) == 0


# -------------------------------------------------------------------- contrastive


def negatives_of(step: Step) -> list[set[int]]:
    """The speakers that each output must not sound like."""
    rows = step.model.attached["phase3_contrastive"]._negatives(step)  # type: ignore[operator]
    return [set(row.tolist()) - {-1} for row in rows]


def test_the_negatives_are_drawn_ones_the_batch_and_the_source_and_never_the_target(surroundings: Surroundings) -> None:
    step = step_of(surroundings, "phase3_contrastive", path=False, max_negatives=1)
    batch = set(step.speaker_ids.tolist()) | set(step.target_ids.tolist())
    sources = step.speaker_ids.repeat(TARGETS).tolist()
    for found, source, target in zip(negatives_of(step), sources, step.target_ids.tolist(), strict=True):
        assert target not in found
        assert source in found
        assert batch - {target} <= found
        assert len(found - batch) <= 1
    few = step_of(surroundings, "phase3_contrastive", path=False, batch_negatives=False, source_negative=False)
    for found, source, target in zip(negatives_of(few), sources, few.target_ids.tolist(), strict=True):
        assert not {source, target} & found


def test_a_conversion_is_pulled_to_all_embeddings_of_its_target(surroundings: Surroundings) -> None:
    for form in ("infonce", "margin"):
        step = step_of(surroundings, "phase3_contrastive", path=False, form=form, margin=2.5)
        at = {name: [] for name in ("reference", "conditioning", "source")}
        for name, goal in (
            ("reference", step.target_reference),
            ("conditioning", step.target.speaker),
            ("source", step.own_reference.repeat(TARGETS, 1)),
        ):
            vars(step)["_embeddings"] = torch.cat([step.own_reference, goal])
            at[name] = loss_of(step)["contrastive"]
        assert at["reference"] < at["source"], form
        assert at["conditioning"] < at["source"], form


def test_without_a_path_the_contrastive_phase_edits_nothing_and_has_no_parameters(surroundings: Surroundings) -> None:
    model = step_of(surroundings, "phase3_contrastive", path=False).model
    assert set(model.edits) == {tap for tap in model.edits if tap.startswith("decoder_")}
    assert not list(model.attached["phase3_contrastive"].parameters())
    alone = ConditionedCodec(surroundings.codec, ["phase3_contrastive"], speaker_dim=SPEAKER_DIM, plugins=CATALOGUE)
    assert list(alone.edits) == ["quantized"]
