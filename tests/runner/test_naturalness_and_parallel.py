"""Naturalness predicted without a reference, and distances to the target's own recording of the sentence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_study import Bench
from torch import Tensor, nn

from snac_core.metric import Conversion
from snac_runner.controls import informative_metrics
from snac_runner.data.audio import load_audio
from snac_runner.evaluate import naturalness, systems
from snac_runner.evaluate.naturalness import DistillMOS, DistillMOSIdentity
from snac_runner.evaluate.parallel import DECIBELS, F0RMSE, MCD, ORDER, distortions, mel_cepstra, warping_path
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.systems import Rendering

RATE = 16000
NOISE = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))


def conversion(converted: Tensor, parallel: Tensor | None = None) -> Conversion:
    """A conversion of which only the converted output, and the recording that it is compared with, matter."""
    return Conversion(pair="p", sample_rate=RATE, source=converted, converted=converted, parallel=parallel)


def vowel(semitones: float = 0.0, seconds: float = 1.0) -> Tensor:
    """A voice at 110 Hz, shifted by some semitones, with a resonance that moves from 400 Hz to 2400 Hz."""
    t = torch.arange(round(seconds * RATE), dtype=torch.float64) / RATE / seconds
    harmonics = torch.arange(1, 30, dtype=torch.float64)[:, None] * 110 * 2 ** (semitones / 12)  # Hz
    levels = torch.exp(-(((harmonics - (400 + 2000 * t)) / 400) ** 2)) + 0.02
    waves = torch.sin(2 * math.pi * harmonics * t * seconds)
    return (0.05 * (levels * waves).sum(0)).float()


# ------------------------------------------------------------------ mel-cepstral distortion


@given(st.floats(0.01, 10.0))
def test_the_distortion_does_not_depend_on_the_level(gain: float) -> None:
    assert MCD()(conversion(gain * NOISE, NOISE)) == pytest.approx(0, abs=0.02)


def test_the_distortion_of_a_filter_is_the_spread_of_its_response_in_decibels() -> None:
    frequency = torch.fft.rfftfreq(len(NOISE), 1 / RATE).double()
    above = 15 + 27 * torch.log(frequency.clamp(min=1) / 1000) / math.log(6.4)
    mel = torch.where(frequency < 1000, frequency * 3 / 200, above)  # Slaney's scale
    position = mel / mel[-1]  # 0 to 1 along the bands
    for order in (1, 3, 6):
        decibels = 6 * torch.cos(math.pi * order * position)
        filtered = torch.fft.irfft(torch.fft.rfft(NOISE.double()) * 10 ** (decibels / 20), n=len(NOISE)).float()
        got, wanted = (mel_cepstra(audio, RATE)[2:-2].mean(0) for audio in (filtered, NOISE))
        # frame by frame the noise adds to it; the mean spectra differ by the response
        assert distortions(got[None], wanted[None])[0, 0] == pytest.approx(6 / math.sqrt(2), rel=0.06)
        assert DECIBELS * 2 * (got - wanted)[order] == pytest.approx(6, rel=0.06)


def test_the_cepstra_are_those_of_librosa() -> None:
    librosa = pytest.importorskip("librosa", reason="needs librosa (the judges extra)")
    import scipy.fft

    speech = vowel().numpy()
    mel = librosa.feature.melspectrogram(y=speech, sr=RATE, n_fft=400, hop_length=160, n_mels=80, pad_mode="constant")
    expected = scipy.fft.dct(np.log(mel.astype(np.float64) + 1e-10), axis=0, norm="ortho")[: ORDER + 1].T / np.sqrt(160)
    assert np.abs(mel_cepstra(vowel(), RATE)[:, 1:] - expected[:, 1:]).max() < 1e-3


@given(arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.floats(0, 10)))
def test_the_path_is_the_cheapest_of_all_monotonic_paths(cost: np.ndarray) -> None:
    least = np.full(cost.shape, np.inf)
    for k, j in np.ndindex(cost.shape):
        before = [least[a, b] for a, b in ((k - 1, j - 1), (k - 1, j), (k, j - 1)) if a >= 0 and b >= 0]
        least[k, j] = cost[k, j] + min(before, default=0.0)
    rows, columns = warping_path(cost)
    assert (rows[0], columns[0]) == (0, 0)
    assert (rows[-1], columns[-1]) == (cost.shape[0] - 1, cost.shape[1] - 1)
    steps = np.stack([np.diff(rows), np.diff(columns)])
    assert ((steps >= 0) & (steps <= 1)).all()
    assert (steps.sum(0) > 0).all()
    assert cost[rows, columns].sum() == pytest.approx(least[-1, -1], abs=1e-9)


def test_a_slower_reading_costs_less_than_another_sound_or_one_that_never_changes() -> None:
    recording = vowel()
    slower, other = MCD()(conversion(vowel(seconds=1.4), recording)), MCD()(conversion(NOISE, recording))
    held = MCD()(conversion(recording[4000:4800].repeat(20), recording))
    assert slower is not None
    assert held is not None
    assert other is not None
    assert slower < 0.6 * held
    assert held < other


# ------------------------------------------------------------------ F0


@pytest.mark.parametrize("semitones", [-7.0, 0.0, 4.0])
def test_the_error_of_f0_is_the_shift_also_at_another_speed(semitones: float) -> None:
    pytest.importorskip("parselmouth", reason="needs praat-parselmouth (the judges extra)")
    for seconds in (1.0, 1.3):
        error = F0RMSE()(conversion(vowel(semitones, seconds), vowel()))
        assert error == pytest.approx(abs(semitones), abs=0.1)
    assert F0RMSE()(conversion(NOISE, vowel())) == 24
    assert F0RMSE()(conversion(vowel(), NOISE)) is None


# ------------------------------------------------------------------ in a study


def test_the_recording_itself_has_no_distance_and_the_source_and_broken_output_have_more(bench: Bench) -> None:
    test = bench.resources(bench.study(pair_seconds=8.0)).test  # whole sentences
    pair = test.items[0].pair
    assert pair.parallel is not None
    assert test.corpus.utterance(pair.parallel.utterance).speaker == pair.target
    metrics = {"mcd": MCD(), "f0_rmse": F0RMSE()}

    def recording(conversions: object, item: systems.Item) -> Rendering:
        audio = test.parallel_audio(item.pair)
        assert audio is not None
        return Rendering(audio)

    found = [score(system, test, metrics).pooled for system in
             (recording, systems.source(), lambda c, item: Rendering(torch.zeros(RATE)))]  # fmt: skip
    for name, metric in metrics.items():
        exact, source, silent = (pooled[name]["mean"] for pooled in found)
        assert exact == pytest.approx(0, abs=1e-6)
        assert 1 < source < silent == metric.worst


def test_without_a_recording_or_the_same_words_nothing_is_compared(bench: Bench) -> None:
    test = bench.resources(bench.study()).test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(test), "parallel_audio", lambda self, pair: None)
        silent = score(lambda c, item: Rendering(torch.zeros(RATE)), test, {"mcd": MCD()})
    assert "mcd" not in silent.pooled, "there is nothing that broken output could be far from"
    assert MCD()(replace(conversion(NOISE, NOISE), same_words=False)) is None


# ------------------------------------------------------------------ naturalness


@pytest.fixture(scope="module")
def distillmos() -> None:
    pytest.importorskip("distillmos", reason="needs distillmos (the judges extra)")


@given(st.integers(0, 40), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3))
def test_the_convolutions_of_a_padded_clip_are_those_of_the_whole_window(
    sound: int, items: int, stride: int, seed: int
) -> None:
    torch.manual_seed(seed)
    first, last = nn.Conv2d(2, 3, 3, padding=(0, 1)), nn.Conv2d(3, 4, 3, stride=(2, stride), padding=(0, 1))
    layers = nn.Sequential(first, nn.LeakyReLU(0.1), nn.Conv2d(3, 3, 3, padding=(0, 1)), nn.LeakyReLU(0.1), last)
    window = torch.randn(items, 2, 9, 40)
    window[..., sound:] = 0
    with torch.no_grad():
        whole, short = layers(window), naturalness.WithoutPadding(layers)(window)
    assert short.shape == whole.shape
    assert torch.allclose(short, whole, atol=1e-6)


@pytest.mark.usefixtures("distillmos")
def test_the_score_of_speech_falls_with_noise_and_does_not_depend_on_the_level(librispeech_mini: Path) -> None:
    speech = load_audio(next(iter(sorted((librispeech_mini / "dev").glob("*/*.flac")))), RATE, seconds=4.0)[0]
    noise = torch.randn(len(speech), generator=torch.Generator().manual_seed(0)) * speech.square().mean().sqrt()
    scores = [naturalness.distillmos(speech + share * noise, RATE) for share in (0, 0.1, 1, 30)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 1
    assert naturalness.distillmos(0.01 * speech, RATE) == pytest.approx(scores[0], abs=1e-3)


@pytest.mark.usefixtures("distillmos")
def test_loading_prints_nothing_and_draws_no_random_number(capsys: pytest.CaptureFixture[str]) -> None:
    naturalness._distillmos.cache_clear()
    state = torch.get_rng_state()
    DistillMOS().prepare()
    assert torch.equal(torch.get_rng_state(), state)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("mean", "kept"), [(1.9, False), (3.6, True)])
def test_a_score_that_rejects_the_sources_themselves_is_not_measured(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mean: float, kept: bool
) -> None:
    monkeypatch.setattr(DistillMOS, "requires", ())
    monkeypatch.setattr(DistillMOS, "prepare", lambda self: None)
    for control in ("source", "floor", "mismatched"):
        folder = tmp_path / "controls" / control
        folder.mkdir(parents=True)
        metrics = {name: {"mean": mean} for name in ("distillmos", "distillmos_identity")}
        (folder / "result.json").write_text(json.dumps({"schema": 2, "status": "success", "metrics": metrics}))
    metrics_here, missing = informative_metrics(tmp_path, bench.resources(bench.study()))
    for name in ("distillmos", "distillmos_identity"):
        assert (name in metrics_here) is kept
        assert kept or "1.90" in missing[name]


@pytest.mark.usefixtures("distillmos")
@pytest.mark.parametrize("seconds", [0.2, 3.1, 9.3])
def test_scores_are_those_of_the_package(seconds: float) -> None:
    from distillmos import ConvTransformerSQAModel

    audio = vowel(seconds=seconds)
    with torch.inference_mode():
        expected = float(ConvTransformerSQAModel().eval()(audio[None]))
    assert naturalness.distillmos(audio, RATE) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("distillmos")
def test_each_output_has_a_score_of_its_own_and_broken_output_the_lowest(bench: Bench) -> None:
    test = bench.resources(bench.study()).test
    metrics = {"distillmos": DistillMOS(), "distillmos_identity": DistillMOSIdentity()}

    def half_silent(conversions: object, item: systems.Item) -> Rendering:
        return Rendering(item.audio[0], identity=torch.full_like(item.audio[0], float("nan")))

    pooled = score(half_silent, test, metrics).pooled
    assert pooled["distillmos"]["mean"] > 1.2
    assert pooled["distillmos_identity"]["mean"] == 1
    assert pooled["distillmos"]["version"].startswith("distillmos ")
    assert "distillmos_identity" not in score(lambda c, item: Rendering(item.audio[0]), test, metrics).pooled


def test_dnsmos_prefers_speech_to_noise_and_accepts_clipped_and_short_audio(bench: Bench) -> None:
    for package in naturalness.DNSMOS.requires:
        pytest.importorskip(package, reason=f"needs {package} (the dnsmos extra)")
    speech = bench.resources(bench.study()).test.items[0].audio[0]
    assert naturalness.dnsmos(speech, RATE) > naturalness.dnsmos(NOISE, RATE) + 0.3
    assert 1 <= naturalness.dnsmos(20 * speech[:3200], RATE) <= 5
