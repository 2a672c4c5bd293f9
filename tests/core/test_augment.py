"""A change of voice moves what it says by as much as it says, and nothing else. Praat's measurements are the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from snac_core.augment import (
    change_voice,
    equalizer,
    imitate,
    long_term_envelope,
    median_pitch,
    random_equalization,
    resample_by,
    shift_formants,
    shift_frequencies,
)
from snac_core.seeding import generator

parselmouth = pytest.importorskip("parselmouth", reason="the oracle of pitch and formants is Praat")
RATE = 16000


def vowel(pitch: float, formants: tuple[float, ...] = (700, 1200, 2600, 3500), seconds: float = 1.0) -> Tensor:
    """Pulses through resonators (T,): a voice as Praat's own source-filter model makes it."""
    pulses = np.diff(np.floor(np.cumsum(np.full(int(seconds * RATE), pitch / RATE))), prepend=0.0)
    wave = lfilter([1], [1, -0.95], pulses)
    for hz, width in zip(formants, (80, 90, 120, 150), strict=True):
        radius = math.exp(-math.pi * width / RATE)
        wave = lfilter([1], [1, -2 * radius * math.cos(2 * math.pi * hz / RATE), radius**2], wave)
    return torch.tensor(0.1 * wave / np.abs(wave).max(), dtype=torch.float32)


def tone(pitch: float, seconds: float = 1.0) -> Tensor:
    """A harmonic tone (T,)."""
    time = torch.arange(int(seconds * RATE)) / RATE
    return 0.1 * sum(torch.sin(2 * math.pi * pitch * k * time) / k for k in range(1, 11))  # type: ignore[return-value]


def pitch_of(audio: Tensor) -> float:
    """In Hz, the median over the middle."""
    track = parselmouth.Sound(audio.double().numpy(), RATE).to_pitch()
    return float(np.nanmedian([track.get_value_at_time(at) for at in np.linspace(0.3, 0.7, 40)]))


def formants_of(audio: Tensor, factor: float) -> np.ndarray:
    """First two formants in Hz, five of them searched for up to 5 kHz times `factor`."""
    track = parselmouth.Sound(audio.double().numpy(), RATE).to_formant_burg(
        max_number_of_formants=5, maximum_formant=5000 * factor
    )
    times = np.linspace(0.3, 0.7, 40)
    return np.array([np.nanmedian([track.get_value_at_time(number, at) for at in times]) for number in (1, 2)])


def test_a_harmonic_tone_moves_by_the_semitones_within_ten_cents_and_keeps_its_duration() -> None:
    wanted = torch.tensor([-12.0, -2.0, -1.0, 0.5, 1.0, 2.0, 7.0])
    audio = tone(200).repeat(len(wanted), 1, 1)
    audio[..., : RATE // 4] = audio[..., -RATE // 8 :] = 0
    moved = change_voice(audio, RATE, wanted, torch.ones(len(wanted)))
    assert moved.shape == audio.shape
    for row, semitones in zip(moved[:, 0], wanted.tolist(), strict=True):
        assert 12 * math.log2(pitch_of(row) / 200) == pytest.approx(semitones, abs=0.1)
        loud = torch.nonzero(row.unfold(0, 160, 160).abs().amax(1) > 0.05).flatten() / 100  # in s
        assert float(loud[0]) == pytest.approx(0.25, abs=0.03)
        assert float(loud[-1]) == pytest.approx(0.865, abs=0.03)


@pytest.mark.parametrize("formants", [(700, 1200, 2600, 3500), (500, 1500, 2500, 3500)], ids=["a", "schwa"])
def test_a_vowels_first_two_formants_move_by_the_factor_and_its_pitch_stays(formants: tuple[float, ...]) -> None:
    factors = torch.tensor([0.8, 0.9, 1.1, 1.2])
    spoken = vowel(100, formants)
    moved = shift_formants(spoken.repeat(4, 1, 1), RATE, factors)
    before = formants_of(spoken, 1.0)
    for row, factor in zip(moved[:, 0], factors.tolist(), strict=True):
        assert formants_of(row, factor) / before == pytest.approx([factor, factor], rel=0.05)
        assert pitch_of(row) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("semitones", [-2.0, 2.0])
def test_a_change_of_pitch_alone_leaves_the_formants_where_they_were(semitones: float) -> None:
    spoken = vowel(100)
    moved = change_voice(spoken.view(1, 1, -1), RATE, torch.tensor([semitones]), torch.ones(1))[0, 0]
    assert formants_of(moved, 1.0) == pytest.approx(formants_of(spoken, 1.0), rel=0.05)
    dragged = shift_frequencies(spoken.view(1, 1, -1), RATE, torch.tensor([2 ** (semitones / 12)]))[0, 0]
    away = formants_of(dragged, 2 ** (semitones / 12)) / formants_of(spoken, 1.0)
    assert away == pytest.approx([2 ** (semitones / 12)] * 2, rel=0.05), "a shift takes formants along"


@pytest.mark.parametrize(("semitones", "factor"), [(2.0, 0.8), (2.0, 1.2), (-2.0, 1.2), (-1.0, 0.8), (1.0, 1.1)])
def test_pitch_and_formants_change_together_each_by_what_was_asked(semitones: float, factor: float) -> None:
    spoken = vowel(100)
    moved = change_voice(spoken.view(1, 1, -1), RATE, torch.tensor([semitones]), torch.tensor([factor]))[0, 0]
    assert moved.shape == spoken.shape
    assert 1200 * np.log2(pitch_of(moved) / pitch_of(spoken)) == pytest.approx(100 * semitones, abs=10)
    # Praat itself errs by some percent where harmonics lie far apart: heard beside a voice that is made so
    so = vowel(100 * 2 ** (semitones / 12), tuple(factor * hz for hz in (700, 1200, 2600, 3500)))
    assert formants_of(moved, factor) == pytest.approx(formants_of(so, factor), rel=0.05)


def test_items_of_a_batch_do_not_hear_each_other() -> None:
    audio, amounts = 0.1 * torch.randn(3, 1, 6000), torch.tensor([-2.0, 1.0, 3.0])
    factors = torch.tensor([0.9, 1.2, 1.0])
    together = change_voice(audio, RATE, amounts, factors)
    alone = [change_voice(audio[i : i + 1], RATE, amounts[i : i + 1], factors[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_a_change_by_nothing_changes_nothing() -> None:
    noise = 0.1 * torch.randn(1, 1, 8000)
    torch.testing.assert_close(shift_formants(noise, RATE, torch.ones(1)), noise, atol=1e-5, rtol=0)
    low = tone(200).view(1, 1, -1)
    for same in (resample_by(low, torch.ones(1), RATE), shift_frequencies(low, RATE, torch.ones(1))):
        torch.testing.assert_close(same[..., 100:-100], low[..., 100:-100], atol=1e-3, rtol=0)


def test_what_the_slower_rate_cannot_hold_does_not_come_back_as_an_alias() -> None:
    time = torch.arange(RATE) / RATE
    high = torch.sin(2 * math.pi * 7000 * time).view(1, 1, -1)
    assert float(resample_by(high, torch.tensor([1.3]), 12000)[..., 200:-200].abs().max()) < 0.01
    kept = torch.sin(2 * math.pi * 5000 * time).view(1, 1, -1)
    assert float(resample_by(kept, torch.tensor([1.3]), 12000)[..., 200:-200].abs().max()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("samples", [40, 700, 20000])
def test_silence_and_short_audio_stay_finite(samples: int) -> None:
    for audio in (torch.zeros(2, 1, samples), 0.1 * torch.randn(2, 1, samples)):
        made = change_voice(audio, RATE, torch.tensor([-2.0, 2.0]), torch.tensor([0.8, 1.2]))
        made = random_equalization(made, RATE, 6.0, generator("colour"))
        assert made.shape == audio.shape
        assert bool(made.isfinite().all())


def test_a_band_of_the_equaliser_has_its_gain_at_its_centre_half_of_it_at_its_edges_and_none_far_away() -> None:
    centre, quality, gain_db = 1000.0, 2.0, 8.0
    width = centre / quality
    upper = width / 2 + math.sqrt(width**2 / 4 + centre**2)  # edges lie around the centre in log frequency
    response = equalizer(
        torch.tensor([20.0, upper - width, centre, upper, 50000.0]),
        torch.tensor([[centre]]), torch.tensor([[gain_db]]), torch.tensor([[quality]]),
    )  # fmt: skip
    assert (20 * response.log10())[0].tolist() == pytest.approx([0, gain_db / 2, gain_db, gain_db / 2, 0], abs=0.05)


def test_a_random_equaliser_stays_within_its_bounds_and_gives_every_item_its_own() -> None:
    noise = 0.1 * torch.randn(1, 1, 16000).repeat(4, 1, 1)
    made = random_equalization(noise, RATE, 6.0, generator("colour"))
    assert len({tuple(row[0, :5].tolist()) for row in made}) == 4
    spectra = [torch.fft.rfft(x).abs().unfold(-1, 400, 400).square().mean(-1).sqrt() for x in (noise, made)]
    change = 20 * (spectra[1] / spectra[0]).log10()
    assert 1.5 < float(change.abs().max()) < 9


@pytest.mark.parametrize("pitch", [70.0, 110.0, 190.0, 320.0])
def test_the_median_pitch_is_accurate_to_a_sample_of_the_period(pitch: float) -> None:
    assert abs(RATE / float(median_pitch(vowel(pitch)[None, None], RATE)) - RATE / pitch) < 1


def test_noise_and_silence_have_no_pitch() -> None:
    noise = 0.1 * torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(0))
    assert torch.isnan(median_pitch(torch.cat([noise, torch.zeros_like(noise)]), RATE)).all()


@pytest.mark.parametrize(("own", "wanted"), [((110.0, 1.0), (200.0, 1.15)), ((200.0, 1.15), (110.0, 1.0))])
def test_an_imitation_has_the_pitch_of_the_reference_and_a_more_similar_envelope(
    own: tuple[float, float], wanted: tuple[float, float]
) -> None:
    formants = (700.0, 1200.0, 2600.0, 3500.0)
    audio, reference = (
        vowel(pitch, tuple(factor * hz for hz in formants))[None, None]
        for pitch, factor in (own, wanted)  # type: ignore[arg-type]
    )
    result = imitate(audio, RATE, reference)
    assert result.shape == audio.shape
    assert pitch_of(result[0, 0]) == pytest.approx(wanted[0], rel=0.02)
    before, after = (
        float((long_term_envelope(x, RATE) - long_term_envelope(reference, RATE)).square().mean())
        for x in (audio, result)
    )
    assert after < before / 2
    assert float(result.square().mean()) == pytest.approx(float(audio.square().mean()), rel=1e-3)


def test_an_imitation_keeps_the_timing_and_does_not_mix_the_batch() -> None:
    gated = vowel(120.0)
    gated[: RATE // 4] = 0
    gated[-RATE // 4 :] = 0
    batch = torch.stack([gated, vowel(180.0)]).unsqueeze(1)
    references = torch.stack([vowel(200.0), vowel(100.0)]).unsqueeze(1)
    result = imitate(batch, RATE, references)
    level = result[0, 0].square().unfold(0, RATE // 10, RATE // 10).mean(1)
    assert level[[0, 1, -2, -1]].max() < 1e-3 * level.max()
    torch.testing.assert_close(imitate(batch[:1], RATE, references[:1])[0], result[0], atol=1e-4, rtol=1e-3)


def test_what_has_no_pitch_is_imitated_without_one() -> None:
    noise = 0.1 * torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(1))
    for audio, reference in ((noise, vowel(200.0)[None, None]), (vowel(120.0)[None, None], noise), (noise * 0, noise)):
        assert imitate(audio, RATE, reference).isfinite().all()
    assert pitch_of(imitate(vowel(120.0)[None, None], RATE, noise)[0, 0]) == pytest.approx(120, rel=0.02)
