"""Pitch, words, codes and controls on signals with known properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import PHASES, Bench, arm

from snac_core.errors import UserError
from snac_core.metric import Conversion
from snac_runner.arm import Arm
from snac_runner.controls import wanted_metrics
from snac_runner.evaluate import systems
from snac_runner.evaluate.codes import SpeakerProbe, summary
from snac_runner.evaluate.content import error_rate
from snac_runner.evaluate.metrics import Top1
from snac_runner.evaluate.prosody import F0Correlation, F0Error, VoicingError, pitch
from snac_runner.evaluate.scoring import degraded
from snac_runner.resources import StudyResources

RATE = 16000
parselmouth = pytest.importorskip("parselmouth", reason="needs praat-parselmouth (the judges extra)")


def voice(hertz: float, depth: float = 0.1, seconds: float = 1.5) -> torch.Tensor:
    """A buzz with a pitch that varies by `depth` octaves twice a second."""
    t = np.arange(int(RATE * seconds)) / RATE
    contour = hertz * 2 ** (depth * np.sin(2 * np.pi * 2 * t))
    phase = 2 * np.pi * np.cumsum(contour) / RATE
    return torch.from_numpy(sum(np.sin(k * phase) / k for k in range(1, 12)) * 0.1).float()


def conversion(source: torch.Tensor, converted: torch.Tensor, **more: object) -> Conversion:
    return Conversion(pair="p", sample_rate=RATE, source=source, converted=converted, **more)  # type: ignore[arg-type]


def test_pitch_is_measured_in_hertz() -> None:
    found = pitch(voice(150, depth=0), RATE)
    assert np.median(found[found > 0]) == pytest.approx(150, rel=0.01)


def test_a_change_of_register_leaves_the_contour_correlated() -> None:
    assert F0Correlation()(conversion(voice(120), voice(220))) == pytest.approx(1.0, abs=0.02)
    assert F0Correlation()(conversion(voice(120), voice(120, depth=-0.1))) == pytest.approx(-1.0, abs=0.02)


def test_pitch_error_is_the_distance_to_the_target_in_semitones() -> None:
    an_octave = F0Error()(conversion(voice(110), voice(110), target=voice(220)))
    assert an_octave == pytest.approx(12.0, abs=0.1)
    assert F0Error()(conversion(voice(110), voice(220), target=voice(220))) == pytest.approx(0.0, abs=0.05)
    hiss = 0.01 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert F0Error()(conversion(voice(110), hiss, target=voice(220))) == F0Error.worst


def test_half_of_a_voice_lost_is_half_of_its_frames_wrong() -> None:
    whole = voice(140)
    half = whole.clone()
    half[len(half) // 2 :] = 0
    assert VoicingError()(conversion(whole, half)) == pytest.approx(0.5, abs=0.06)
    assert VoicingError()(conversion(whole, whole)) == 0
    assert VoicingError()(conversion(whole, whole[: len(whole) // 2])) == pytest.approx(0.5, abs=0.06)  # ends too early


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_an_error_rate_is_between_0_and_1(wanted: list[str], got: list[str]) -> None:
    rate = error_rate(wanted, got)
    assert 0 <= rate <= 1
    assert (rate == 0) == (wanted == got)
    assert error_rate(wanted, []) == 1


def test_a_study_does_not_measure_what_it_excludes(bench: Bench) -> None:
    metrics, missing = wanted_metrics(bench.resources(bench.study(exclude_metrics=("per", "f0_error"))))
    assert not {"per", "f0_error"} & metrics.keys()
    assert missing["per"] == "excluded by the study"
    with pytest.raises(UserError, match="did you mean 'pesq'"):
        wanted_metrics(bench.resources(bench.study(exclude_metrics=("pesk",))))


def test_the_most_similar_target_is_identified() -> None:
    e = torch.eye(3)
    seen = conversion(
        torch.ones(9), torch.ones(9), embeddings={"converted": e[1]},
        candidates={"a": e[0], "b": (e[1] + e[2]) / 2**0.5}, target_speaker="b",
    )  # fmt: skip
    assert Top1()(seen) == 1.0
    assert Top1()(conversion(torch.ones(9), torch.ones(9))) is None


def test_degraded_audio_has_no_highs_and_noise_at_30_db() -> None:
    rate, t = 24000, torch.arange(24000) / 24000
    low, high = torch.sin(2 * torch.pi * 1000 * t), torch.sin(2 * torch.pi * 9000 * t)
    rough = degraded(low + high, rate)
    residue = rough - low
    assert 10 * torch.log10(low.square().mean() / residue.square().mean()) == pytest.approx(30, abs=0.5)


def test_the_mismatched_control_is_another_utterance(bench: Bench) -> None:
    resources = bench.resources(bench.study())
    items = resources.test.items
    system = systems.mismatched(resources.codec)
    floor = systems.floor(resources.codec)
    assert torch.equal(system(resources.test, items[0]).converted, floor(resources.test, items[1]).converted)


def test_the_signal_processing_baseline_has_the_targets_pitch_and_the_sources_length(bench: Bench) -> None:
    from snac_runner.evaluate.systems import praat_change_gender

    source = voice(120)
    moved = praat_change_gender(source, RATE, 180.0, 1.1)
    assert len(moved) == len(source)
    found = pitch(moved, RATE)
    assert np.median(found[found > 0]) == pytest.approx(180, rel=0.03)


def test_the_signal_processing_baseline_is_the_same_every_time() -> None:
    from snac_runner.evaluate.systems import praat_change_gender

    hiss = 0.05 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))  # voiceless: Praat is random there
    source = torch.cat([voice(120), hiss])
    assert torch.equal(praat_change_gender(source, RATE, 180.0, 1.1), praat_change_gender(source, RATE, 180.0, 1.1))


@pytest.fixture(scope="module")
def resources(bench: Bench) -> StudyResources:
    return bench.resources(bench.study())


def test_the_probe_recognises_real_speakers_in_their_codes(resources: StudyResources) -> None:
    probe = SpeakerProbe(resources.codec, resources.test)
    hits = []
    for speaker in probe.names:
        audio = resources.test.target_audio(speaker, "scoring")
        hits.append([who == speaker for who in probe.who([c[0] for c in resources.codec.encode(audio[None, None])])])
    assert np.mean(hits) > 1.5 / len(probe.names)  # trained on this very audio: above chance or it learns nothing


def test_unchanged_codes_are_counted(resources: StudyResources) -> None:
    row = {"codes": [[1, 1, 2, 2]], "bare_codes": [[1, 1, 2, 3]], "edits": {"latent": 0.5}}
    found = summary([row], None)
    assert found["changed"] == [0.25]
    assert found["perplexity"] == [pytest.approx(2.0)]
    assert found["used"] == [2]
    assert found["edits"] == {"latent": 0.5}


def test_the_size_of_an_edit_is_0_at_the_start_and_positive_after_a_change(
    resources: StudyResources, tmp_path: object
) -> None:
    one = Arm.new(arm(PHASES[1]), 0, tmp_path, resources)  # type: ignore[arg-type]
    item = resources.test.items[0]
    sizes = systems.conditioned(one.model)(resources.test, item).edits
    assert sizes
    assert all(size == 0 for size in sizes.values())
    with torch.no_grad():
        for _, parameter in one.model.trained_parameters():
            parameter.add_(0.05)
    moved = systems.conditioned(one.model)(resources.test, item).edits
    assert set(moved) == set(sizes) == set(one.model.edits)
    assert all(size > 0 for size in moved.values())


def test_a_shuffled_arm_is_conditioned_on_another_speaker_and_scored_on_the_right_one(
    resources: StudyResources, tmp_path: object
) -> None:
    plain = Arm.new(arm(PHASES[1]), 0, tmp_path, resources).sampler.table  # type: ignore[arg-type]
    wrong = Arm.new(arm(PHASES[1], shuffled_speakers=True), 0, tmp_path, resources).sampler.table  # type: ignore[arg-type]
    assert torch.equal(wrong.reference, plain.reference)
    assert not (wrong.conditioning == plain.conditioning).all(dim=1).any()
    assert sorted(map(tuple, wrong.conditioning.tolist())) == sorted(map(tuple, plain.conditioning.tolist()))
