"""Changes of pitch, formants and spectral balance that keep the words and the timing: random, or towards other speech.

All functions take batches, with another amount for every item, and have no gradient.

Pitch is shifted by a ratio r in two steps. The phase vocoder (Flanagan and Golden 1966) stretches the duration by r:
output frame j takes the magnitudes of input frame j / r, and its phases advance by the input's phase advance there.
Resampling by r then multiplies every frequency by r and restores the duration. This shifts formants together with the
harmonics; shifting the formants by 1 / r first compensates for it.

Formants are shifted by a factor a on the spectral envelope alone. Linear prediction (Makhoul 1975) gives the envelope
1 / |A(f)| of every frame; each bin is multiplied by |A(f)| / |A(f / a)|, which replaces the envelope by the stretched
one. The harmonics, and so the pitch, do not change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snac_core.spectral import stft

_LOBES = 16  # zero crossings of the interpolating sinc on either side
_PASSBAND = 0.95  # of the lower Nyquist frequency; the rest is the transition band of the windowed sinc
_SMOOTH = 40.0  # Hz; standard deviation of the smoothing of spectra before prediction, to remove the harmonics
_MAX_GAIN = math.log(10.0)  # of a bin: 20 dB
FACTORS = tuple(0.82 + 0.03 * n for n in range(14))
"""Factors of formants to choose from, 0.82 to 1.21: voices of adults differ by up to about 20 %."""
_MAX_SHIFT = 14.0  # semitones
_PITCHES = (60.0, 400.0)  # Hz
_OCTAVE_COST = 0.03  # of the autocorrelation, per octave of the period
_VOICED = 0.6  # least normalised autocorrelation of a voiced frame
_LOUD = 1e-3  # of the energy of the loudest frame: -30 dB
_QUEFRENCY = 1.5e-3  # s; the period of any voice is longer


def change_voice(audio: Tensor, sample_rate: int, semitones: Tensor, formants: Tensor) -> Tensor:
    """Shift pitch and formants independently; the duration does not change.

    Args:
        audio: (B, 1, T).
        sample_rate: in Hz.
        semitones: (B,), shift of the pitch.
        formants: (B,), factors of the formants' frequencies.

    Returns:
        (B, 1, T).
    """
    ratio = 2 ** (semitones / 12)
    return shift_frequencies(shift_formants(audio, sample_rate, formants / ratio), sample_rate, ratio)


@torch.no_grad()
def shift_frequencies(audio: Tensor, sample_rate: int, ratio: Tensor) -> Tensor:
    """Multiply all frequencies of (B, 1, T), harmonics and formants, by `ratio` (B,); the duration does not change."""
    ratio = ratio.to(audio)
    n_fft, window = _frames(sample_rate, audio)
    padded = torch.nn.functional.pad(audio.squeeze(1), (0, n_fft))  # so that the last frame is complete
    spectrum = stft(padded, window, n_fft // 8, padding="reflect")  # (B, bins, K)
    frames = spectrum.shape[-1]
    place = torch.arange(math.ceil(frames * float(ratio.max())), device=audio.device) / ratio[:, None]  # (B, J)
    left = place.long().clamp(max=frames - 2)
    part = (place - left).unsqueeze(1)
    before, after = (
        spectrum.gather(2, (left + offset).unsqueeze(1).expand(-1, spectrum.shape[1], -1)) for offset in (0, 1)
    )
    magnitude = (before.abs() * (1 - part) + after.abs() * part) * (place < frames).unsqueeze(1)
    advance = (after * before.conj()).angle()  # per hop, modulo 2 pi
    phase = torch.cat([before[..., :1].angle(), advance[..., :-1]], dim=-1).cumsum(-1)
    length = math.ceil(audio.shape[-1] * float(ratio.max())) + n_fft // 4
    longer = torch.istft(torch.polar(magnitude, phase), n_fft, n_fft // 8, window=window, length=length)
    return resample_by(longer.unsqueeze(1), ratio, audio.shape[-1])


@torch.no_grad()
def resample_by(audio: Tensor, ratio: Tensor, samples: int) -> Tensor:
    """Resample (B, 1, T') with another factor for every item: output sample n is the input at n * ratio.

    Uses a Hann-windowed sinc with its cutoff below both Nyquist frequencies. The input is padded with zeros.
    `torchaudio.functional.resample` has one rational factor per call.

    Args:
        audio: (B, 1, T').
        ratio: (B,); above 1 the speech becomes shorter and higher.
        samples: T of the result (B, 1, T).
    """
    ratio = ratio.to(audio)[:, None]
    cutoff = _PASSBAND / ratio.clamp(min=1)
    reach = _LOBES / cutoff  # samples on either side
    most = math.ceil(float(reach.max()))
    place = torch.arange(samples, device=audio.device) * ratio.double()  # (B, T)
    centre = place.long()
    padded = torch.nn.functional.pad(audio.squeeze(1), (most, most + 1))
    read = torch.zeros_like(place, dtype=audio.dtype)
    for offset in range(1 - most, most + 1):
        away = (centre + offset - place).to(audio.dtype)
        weight = cutoff * torch.sinc(cutoff * away) * torch.cos(math.pi / 2 * (away / reach).clamp(-1, 1)).square()
        read += weight * padded.gather(1, (centre + offset + most).clamp(max=padded.shape[1] - 1))
    return read.unsqueeze(1)


@torch.no_grad()
def shift_formants(audio: Tensor, sample_rate: int, factor: Tensor) -> Tensor:
    """Stretch the spectral envelope of (B, 1, T) by `factor` (B,) along frequency; the pitch does not change."""
    n_fft, window = _frames(sample_rate, audio)
    spectrum = stft(audio.squeeze(1), window, n_fft // 4, padding="reflect")  # (B, bins, K)
    predictor = _predictor(spectrum, sample_rate, n_fft)  # (B, K, order + 1)
    bins = torch.arange(spectrum.shape[1], device=audio.device).to(audio)
    place = (bins / factor.to(audio)[:, None]).clamp(max=n_fft / 2)  # (B, bins)
    here, there = (_log_response(predictor, at * (2 * math.pi / n_fft)) for at in (bins.expand_as(place), place))
    changed = spectrum * (here - there).clamp(-_MAX_GAIN, _MAX_GAIN).exp()
    moved: Tensor = torch.istft(changed, n_fft, n_fft // 4, window=window, length=audio.shape[-1])
    return moved.unsqueeze(1)


@torch.no_grad()
def imitate(audio: Tensor, sample_rate: int, reference: Tensor) -> Tensor:
    """Give speech the median pitch, formant range and long-term spectrum of other speech; timing and level stay.

    The words are those of `audio`, so every frame of the result has a frame of `audio` that says the same. The formant
    factor is that of `FACTORS` with which the long-term envelope of `audio` is most similar to that of `reference`; a
    filter removes the remaining difference of the envelopes.

    Args:
        audio: (B, 1, T).
        sample_rate: in Hz.
        reference: (B, 1, T'), speech of the speakers to imitate, with other words.

    Returns:
        (B, 1, T). The pitch of an item does not change if it or its reference has no voiced frame.
    """
    pitch, wanted_pitch = median_pitch(audio, sample_rate), median_pitch(reference, sample_rate)
    semitones = (12 * (wanted_pitch / pitch).log2()).nan_to_num(0.0).clamp(-_MAX_SHIFT, _MAX_SHIFT)
    envelope, wanted = (long_term_envelope(x, sample_rate) for x in (audio, reference))
    stretched = torch.stack([_stretch(envelope, factor) for factor in FACTORS])  # (factors, B, bins)
    factors = torch.tensor(FACTORS).to(audio)[(wanted - stretched).square().mean(-1).argmin(0)]
    changed = _resynthesize(audio, sample_rate, 2 ** (semitones / 12), factors)
    gain = (wanted - long_term_envelope(changed, sample_rate)).clamp(-_MAX_GAIN, _MAX_GAIN)
    filtered = _filtered(changed, gain.exp(), sample_rate)
    level = (audio.square().mean(-1, keepdim=True) / filtered.square().mean(-1, keepdim=True).clamp(min=1e-9)).sqrt()
    return filtered * level


def _resynthesize(audio: Tensor, sample_rate: int, ratio: Tensor, formants: Tensor) -> Tensor:
    """(B, 1, T) with the pitch times `ratio` (B,) and the formants times `formants` (B,), over the whole band.

    Shifting a spectrum down leaves its top empty. Only the excitation, which is flat, is shifted here, and above
    `ratio` times half the rate, where speech has little harmonic energy, the unshifted excitation stays.
    """
    n_fft, window = _frames(sample_rate, audio)

    def spectrum_of(wave: Tensor) -> Tensor:
        return stft(wave.squeeze(1), window, n_fft // 4, padding="reflect")

    def wave_of(spectrum: Tensor) -> Tensor:
        wave: Tensor = torch.istft(spectrum, n_fft, n_fft // 4, window=window, length=audio.shape[-1])
        return wave.unsqueeze(1)

    spectrum = spectrum_of(audio)
    predictor = _predictor(spectrum, sample_rate, n_fft)
    bins = torch.arange(spectrum.shape[1], device=audio.device).to(audio).expand(len(audio), -1)
    excitation = spectrum * _log_response(predictor, bins * (2 * math.pi / n_fft)).exp()
    shifted = spectrum_of(shift_frequencies(wave_of(excitation), sample_rate, ratio))
    empty = bins > (_PASSBAND * n_fft / 2 * ratio)[:, None]
    excitation = torch.where(empty.unsqueeze(-1), excitation, shifted)
    place = (bins / formants[:, None]).clamp(max=n_fft / 2)
    return wave_of(excitation * (-_log_response(predictor, place * (2 * math.pi / n_fft))).exp())


@torch.no_grad()
def median_pitch(audio: Tensor, sample_rate: int) -> Tensor:
    """Median F0 (B,) of the voiced frames of (B, 1, T), in Hz; NaN without a voiced frame.

    F0 is the highest peak of the autocorrelation divided by that of the window, between 60 and 400 Hz (Boersma 1993).
    It is accurate to one sample of the period.
    """
    size = 2 ** math.ceil(math.log2(0.05 * sample_rate))
    window = torch.hann_window(size, dtype=audio.dtype, device=audio.device)
    wave = audio.squeeze(1)
    frames = torch.nn.functional.pad(wave, (0, max(0, size - wave.shape[-1]))).unfold(-1, size, size // 4)

    def autocorrelation(x: Tensor) -> Tensor:
        lags: Tensor = torch.fft.irfft(torch.fft.rfft(x, 2 * size).abs().square())
        return lags[..., :size]

    shortest, longest = math.ceil(sample_rate / _PITCHES[1]), math.floor(sample_rate / _PITCHES[0])
    lags = autocorrelation((frames - frames.mean(-1, keepdim=True)) * window)
    of_window = autocorrelation(window)
    correlation = lags / lags[..., :1].clamp(min=1e-9) * of_window[0] / of_window
    number = torch.arange(shortest, longest + 1, device=audio.device)
    strength = correlation[..., shortest : longest + 1]
    best = (strength - _OCTAVE_COST * number.log2()).argmax(-1)  # without a cost, twice the period is as good
    energy = lags[..., 0]
    voiced = (strength.gather(-1, best.unsqueeze(-1)).squeeze(-1) > _VOICED) & (
        energy > _LOUD * energy.amax(-1, keepdim=True)
    )
    pitch = (sample_rate / (best + shortest)).masked_fill(~voiced, math.nan)
    return pitch.nanmedian(-1).values.to(audio)


@torch.no_grad()
def long_term_envelope(audio: Tensor, sample_rate: int) -> Tensor:
    """Envelope (B, bins) of the mean log magnitude spectrum of the loud frames of (B, 1, T), in nats; its mean is 0.

    Smoothed in the cepstral domain, so that harmonics do not remain.
    """
    n_fft, window = _frames(sample_rate, audio)
    magnitude = stft(audio.squeeze(1), window, n_fft // 4, padding="reflect").abs()  # (B, bins, K)
    energy = magnitude.square().sum(1)
    loud = (energy > _LOUD * energy.amax(-1, keepdim=True)).unsqueeze(1)
    mean = (magnitude.clamp(min=1e-5).log() * loud).sum(-1) / loud.sum(-1).clamp(min=1)
    cepstrum = torch.fft.irfft(mean)
    kept = round(_QUEFRENCY * sample_rate)
    cepstrum[:, 0] = 0
    cepstrum[:, kept + 1 : cepstrum.shape[1] - kept] = 0
    envelope: Tensor = torch.fft.rfft(cepstrum).real
    return envelope


def _stretch(envelope: Tensor, factor: float) -> Tensor:
    """(B, bins) stretched along frequency: bin k has the value of bin k / factor; constant above the last bin."""
    place = (torch.arange(envelope.shape[1], device=envelope.device) / factor).clamp(max=envelope.shape[1] - 1)
    left = place.long().clamp(max=envelope.shape[1] - 2)
    part = place - left
    return envelope[:, left] * (1 - part) + envelope[:, left + 1] * part


def _filtered(audio: Tensor, response: Tensor, sample_rate: int) -> Tensor:
    """(B, 1, T) filtered with zero phase by magnitude responses (B, bins), evenly spaced from 0 to half the rate."""
    size = audio.shape[-1] + sample_rate // 10  # no circular convolution
    spectrum = torch.fft.rfft(audio.squeeze(1), size)
    response = torch.nn.functional.interpolate(
        response.unsqueeze(1), spectrum.shape[-1], mode="linear", align_corners=True
    ).squeeze(1)
    filtered: Tensor = torch.fft.irfft(spectrum * response, size)
    return filtered[:, : audio.shape[-1]].unsqueeze(1)


def equalizer(frequency: Tensor, centre: Tensor, gain_db: Tensor, quality: Tensor) -> Tensor:
    """Magnitude response of parametric equalizers: second-order peaking filters in series.

    The gain of a filter is `gain_db` at its centre, 0 dB far from it, and half of `gain_db` at the edges of its
    bandwidth, centre / quality (the analog prototype of Bristow-Johnson's Audio EQ Cookbook).

    Args:
        frequency: (bins,), in Hz.
        centre: (B, N) centre frequencies of the N filters of each item, in Hz.
        gain_db: (B, N), in dB.
        quality: (B, N), Q: centre frequency over bandwidth.

    Returns:
        (B, bins).
    """
    relative = frequency / centre.unsqueeze(-1)
    reactance = (1 - relative.square()).square()
    amplitude = 10 ** (gain_db / 40).unsqueeze(-1)
    damping = relative / quality.unsqueeze(-1)
    response = (reactance + (damping * amplitude).square()) / (reactance + (damping / amplitude).square())
    return response.prod(dim=1).sqrt()


def random_equalizer(count: int, frequency: Tensor, gain_db: float, draw: torch.Generator, *, bands: int = 8) -> Tensor:
    """Magnitude responses (count, bins) of random equalizers, with gains uniform in [-gain_db, gain_db].

    The centres are evenly spaced in log frequency between 60 Hz and 0.8 of the highest frequency, Q is between 2 and 5,
    after the information perturbation of NANSY (Choi et al. 2021, appendix).
    """
    numbers = torch.rand(2, count, bands, generator=draw).to(frequency)
    octaves = torch.linspace(0, 1, bands, device=frequency.device)
    centre = (60 * (0.8 * frequency[-1] / 60) ** octaves).expand(count, -1)
    return equalizer(frequency, centre, gain_db * (2 * numbers[0] - 1), 2 * (5 / 2) ** numbers[1])


@torch.no_grad()
def random_equalization(
    audio: Tensor,
    sample_rate: int,
    gain_db: float,
    draw: torch.Generator,
    *,
    count: int | None = None,
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """Filter (B, 1, T) with another `random_equalizer` for every item, with zero phase.

    Args:
        audio: (B, 1, T).
        sample_rate: in Hz.
        gain_db: largest gain, in dB.
        draw: the random generator.
        count: number of equalizers to draw; B if None.
        rows: which B of them to use.
    """
    size = audio.shape[-1] + sample_rate // 10  # no circular convolution
    spectrum = torch.fft.rfft(audio.squeeze(1), size)
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[-1], device=audio.device)
    responses = random_equalizer(len(audio) if count is None else count, frequency, gain_db, draw)[rows]
    coloured: Tensor = torch.fft.irfft(spectrum * responses, size)
    return coloured[:, : audio.shape[-1]].unsqueeze(1)


def _frames(sample_rate: int, audio: Tensor) -> tuple[int, Tensor]:
    """A window length of at least 40 ms, to resolve the harmonics (shorter for short audio), and the Hann window."""
    n_fft = 2 ** math.ceil(math.log2(0.04 * sample_rate))
    while n_fft // 2 >= audio.shape[-1]:
        n_fft //= 2
    return n_fft, torch.hann_window(n_fft, dtype=audio.dtype, device=audio.device)


def _predictor(spectrum: Tensor, sample_rate: int, n_fft: int) -> Tensor:
    """Linear prediction of every frame: spectra (B, bins, K) to coefficients (B, K, order + 1), the first of them 1.

    Pre-emphasis removes the spectral tilt of the glottal source; the lag window removes the harmonics; white noise at
    -50 dB keeps the equations well-conditioned.
    """
    order = min(4 + 2 * round(sample_rate / 2000), n_fft // 4)
    angle = torch.linspace(0, math.pi, spectrum.shape[1], device=spectrum.device)
    emphasis = 1 + 0.97**2 - 2 * 0.97 * angle.cos()
    power = spectrum.abs().square() * emphasis[:, None]
    lags = torch.fft.irfft(power.transpose(1, 2))[..., : order + 1]
    number = torch.arange(order + 1, device=spectrum.device)
    lags = lags * torch.exp(-0.5 * (2 * math.pi * _SMOOTH / sample_rate * number).square())
    lags = lags / lags[..., :1].clamp(min=1e-9)
    matrix = lags[..., (number[1:, None] - number[None, 1:]).abs()]
    matrix = matrix + 1e-5 * torch.eye(order, device=spectrum.device)
    solution = torch.linalg.solve(matrix, lags[..., 1:])
    return torch.cat([torch.ones_like(solution[..., :1]), -solution], dim=-1)


def _log_response(predictor: Tensor, angle: Tensor) -> Tensor:
    """log |A| of predictors (B, K, order + 1) at angles (B, bins), in radians per sample: (B, bins, K)."""
    turns = angle.unsqueeze(-1) * torch.arange(predictor.shape[-1], device=angle.device)  # (B, bins, order + 1)
    real, imaginary = (part(turns) @ predictor.transpose(1, 2) for part in (torch.cos, torch.sin))
    return 0.5 * (real.square() + imaginary.square()).clamp(min=1e-12).log()
