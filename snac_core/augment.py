"""Another voice saying the same: changes of pitch, formants and spectral balance that leave words and timing alone.

All work on whole batches with an amount for every item, and are no part of any gradient.

A change of pitch by a ratio r plays the speech at another speed and undoes the change of duration. The phase vocoder
(Flanagan and Golden 1966) makes it longer by r without touching its spectrum: output frame j takes the magnitudes that
the input has at frame j / r, and its phases go on by what the input's phases went on by there. Reading the result r
times as fast then multiplies every frequency by r and gives back the old duration. That moves formants along with the
harmonics; a change of formants by 1 / r puts them back.

A change of formants by a factor a needs the envelope apart from the harmonics. In every frame linear prediction
(Makhoul 1975) gives the envelope 1 / |A(f)| of the vocal tract; each bin is multiplied by |A(f)| / |A(f / a)|, which
takes the envelope away and puts it back stretched. Harmonics stay where they are, and so does the pitch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snac_core.spectral import stft

_LOBES = 16  # zero crossings of the interpolating sinc on either side
_PASSBAND = 0.95  # of the lower Nyquist frequency; a Hann-windowed sinc of 16 lobes needs the rest to fall off
_SMOOTH = 40.0  # Hz; standard deviation by which spectra are smoothed before prediction, so that it finds no harmonics
_MOST = math.log(10.0)  # of the change of a bin's magnitude: 20 dB


def change_voice(audio: Tensor, sample_rate: int, semitones: Tensor, formants: Tensor) -> Tensor:
    """Move pitch and formants, each by its own amount; duration and timing stay.

    Args:
        audio: (B, 1, T).
        sample_rate: in Hz.
        semitones: (B,), what the pitch moves by.
        formants: (B,), factors on the formants' frequencies.

    Returns:
        (B, 1, T).
    """
    ratio = 2 ** (semitones / 12)
    return shift_frequencies(shift_formants(audio, sample_rate, formants / ratio), sample_rate, ratio)


@torch.no_grad()
def shift_frequencies(audio: Tensor, sample_rate: int, ratio: Tensor) -> Tensor:
    """Multiply all frequencies of (B, 1, T) by `ratio` (B,), harmonics and formants alike; duration and timing stay."""
    ratio = ratio.to(audio)
    n_fft, window = _frames(sample_rate, audio)
    padded = torch.nn.functional.pad(audio.squeeze(1), (0, n_fft))  # so that every item ends in whole frames
    spectrum = stft(padded, window, n_fft // 8, padding="reflect")  # (B, bins, K)
    frames = spectrum.shape[-1]
    place = torch.arange(math.ceil(frames * float(ratio.max())), device=audio.device) / ratio[:, None]  # (B, J)
    left = place.long().clamp(max=frames - 2)
    part = (place - left).unsqueeze(1)
    before, after = (
        spectrum.gather(2, (left + offset).unsqueeze(1).expand(-1, spectrum.shape[1], -1)) for offset in (0, 1)
    )
    magnitude = (before.abs() * (1 - part) + after.abs() * part) * (place < frames).unsqueeze(1)
    advance = (after * before.conj()).angle()  # per hop, modulo a turn, which is all that a phase needs
    phase = torch.cat([before[..., :1].angle(), advance[..., :-1]], dim=-1).cumsum(-1)
    length = math.ceil(audio.shape[-1] * float(ratio.max())) + n_fft // 4
    longer = torch.istft(torch.polar(magnitude, phase), n_fft, n_fft // 8, window=window, length=length)
    return resample_by(longer.unsqueeze(1), ratio, audio.shape[-1])


@torch.no_grad()
def resample_by(audio: Tensor, ratio: Tensor, samples: int) -> Tensor:
    """Resample (B, 1, T') by factors of its own for every item: sample n of the result is read at n * ratio.

    By a sinc under a Hann window that lets through what both rates can hold. Past the end there is silence.

    Args:
        audio: (B, 1, T').
        ratio: (B,); above 1 the speech becomes shorter, and higher by as much.
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
    """Stretch the spectral envelope of (B, 1, T) by `factor` (B,) along frequency; the harmonics, and pitch, stay."""
    n_fft, window = _frames(sample_rate, audio)
    spectrum = stft(audio.squeeze(1), window, n_fft // 4, padding="reflect")  # (B, bins, K)
    predictor = _predictor(spectrum, sample_rate, n_fft)  # (B, K, order + 1)
    bins = torch.arange(spectrum.shape[1], device=audio.device).to(audio)
    place = (bins / factor.to(audio)[:, None]).clamp(max=n_fft / 2)  # (B, bins)
    here, there = (_log_response(predictor, at * (2 * math.pi / n_fft)) for at in (bins.expand_as(place), place))
    changed = spectrum * (here - there).clamp(-_MOST, _MOST).exp()
    moved: Tensor = torch.istft(changed, n_fft, n_fft // 4, window=window, length=audio.shape[-1])
    return moved.unsqueeze(1)


def equalizer(frequency: Tensor, centre: Tensor, gain_db: Tensor, quality: Tensor) -> Tensor:
    """Magnitude response of parametric equalisers: peaking filters of the second order in series.

    A filter multiplies magnitudes by its gain at its centre, by 1 far from it, and by half the gain (in dB) at the
    edges of a band centre / quality wide (the analogue prototype of Bristow-Johnson's audio equaliser cookbook).

    Args:
        frequency: (bins,), in Hz.
        centre: (B, N) centres of the N filters of each item, in Hz.
        gain_db: (B, N), in dB.
        quality: (B, N), the centre over the width.

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
    """Responses (count, bins) of equalisers whose gains are uniform within `gain_db` either way.

    The centres lie evenly in log frequency between 60 Hz and 0.8 of the highest frequency; the qualities between 2 and
    5, after NANSY (Choi et al. 2021, appendix), which perturbs information in this way.
    """
    numbers = torch.rand(2, count, bands, generator=draw).to(frequency)
    octaves = torch.linspace(0, 1, bands, device=frequency.device)
    centre = (60 * (0.8 * frequency[-1] / 60) ** octaves).expand(count, -1)
    return equalizer(frequency, centre, gain_db * (2 * numbers[0] - 1), 2 * (5 / 2) ** numbers[1])


@torch.no_grad()
def random_equalization(audio: Tensor, sample_rate: int, gain_db: float, draw: torch.Generator) -> Tensor:
    """(B, 1, T) through a `random_equalizer` of its own for every item, with zero phase."""
    size = audio.shape[-1] + sample_rate // 10  # so that the response does not wrap around
    spectrum = torch.fft.rfft(audio.squeeze(1), size)
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[-1], device=audio.device)
    coloured: Tensor = torch.fft.irfft(spectrum * random_equalizer(len(audio), frequency, gain_db, draw), size)
    return coloured[:, : audio.shape[-1]].unsqueeze(1)


def _frames(sample_rate: int, audio: Tensor) -> tuple[int, Tensor]:
    """Window of at least 40 ms, which tells the harmonics of any voice apart, and short audio bears; and the window."""
    n_fft = 2 ** math.ceil(math.log2(0.04 * sample_rate))
    while n_fft // 2 >= audio.shape[-1]:
        n_fft //= 2
    return n_fft, torch.hann_window(n_fft, dtype=audio.dtype, device=audio.device)


def _predictor(spectrum: Tensor, sample_rate: int, n_fft: int) -> Tensor:
    """Linear prediction of every frame: spectra (B, bins, K) to (B, K, order + 1), the first coefficient 1.

    Pre-emphasis leaves the fall of the source's spectrum out of the envelope; a window over the lags smooths away
    the harmonics; a white floor 50 dB down keeps the equations well-posed, in silence too.
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
    """log |A| of predictors (B, K, order + 1) at angles (B, bins), in radians a sample: (B, bins, K)."""
    turns = angle.unsqueeze(-1) * torch.arange(predictor.shape[-1], device=angle.device)  # (B, bins, order + 1)
    real, imaginary = (part(turns) @ predictor.transpose(1, 2) for part in (torch.cos, torch.sin))
    return 0.5 * (real.square() + imaginary.square()).clamp(min=1e-12).log()
