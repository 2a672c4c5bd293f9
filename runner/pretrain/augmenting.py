"""Other voices out of the ones there are: changes of level, speed (with pitch and formants) and formants alone."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torchaudio.functional import resample

from runner.pretrain.settings import Augmentation

_SPEED_STEPS = 20  # speeds are multiples of 1/20: small ratios make short resampling filters
_ENVELOPE = 500.0  # Hz; what varies along the spectrum within this is harmonics, not formants
_MOST = math.log(10.0)  # of the change of a bin's magnitude: 20 dB


def augment(audio: Tensor, samples: int, sample_rate: int, how: Augmentation, draw: torch.Generator) -> Tensor:
    """Change items one by one, a pure function of the generator's state.

    Args:
        audio: (B, 1, T') with T' at least `samples * (1 + speed)`.
        samples: T of the result (B, 1, T).
        sample_rate: in Hz.
        how: by how much.
        draw: four numbers an item are drawn.
    """
    rows = []
    for row in audio:
        gain, changed, speed, formant = torch.rand(4, generator=draw).tolist()
        if changed < how.changed:
            most = int(how.speed * _SPEED_STEPS)
            factor = Fraction(_SPEED_STEPS + round((2 * speed - 1) * most), _SPEED_STEPS)
            row = row[:, : -(-samples * factor.numerator // factor.denominator)]
            row = resample(row, factor.numerator, factor.denominator)
            if how.formant:
                row = move_formants(row, sample_rate, 1 + (2 * formant - 1) * how.formant)
        row = row[:, :samples] * 10 ** ((2 * gain - 1) * how.gain_db / 20)
        peak = float(row.abs().max())
        rows.append(row / peak if peak > 1 else row)
    return torch.stack(rows)


def move_formants(audio: Tensor, sample_rate: int, factor: float) -> Tensor:
    """Stretch the spectral envelope of (1, T) by `factor` along frequency; the harmonics, and so the pitch, stay.

    The envelope is the power averaged over `_ENVELOPE` of frequency. Every bin is multiplied by the envelope at its
    frequency / factor over that at its frequency.
    """
    n_fft = 2 ** math.ceil(math.log2(0.04 * sample_rate))
    window = torch.hann_window(n_fft, device=audio.device)
    spectrum = torch.stft(audio, n_fft, n_fft // 4, window=window, return_complex=True)  # (1, bins, frames)
    power = spectrum.abs().square().transpose(1, 2)  # (1, frames, bins)
    width = 2 * round(0.5 * _ENVELOPE * n_fft / sample_rate) + 1
    kernel = torch.hann_window(width + 2, periodic=False, device=audio.device)[1:-1]
    smooth = torch.nn.functional.conv1d(power.transpose(0, 1), (kernel / kernel.sum()).view(1, 1, -1), padding="same")
    envelope = 0.5 * smooth.transpose(0, 1).transpose(1, 2).clamp(min=1e-10).log()
    bins = envelope.shape[1]
    place = (torch.arange(bins, device=audio.device) / factor).clamp(max=bins - 1)
    below = place.long().clamp(max=bins - 2)
    part = (place - below)[:, None]
    moved = envelope[:, below] * (1 - part) + envelope[:, below + 1] * part
    changed = spectrum * (moved - envelope).clamp(-_MOST, _MOST).exp()
    return torch.istft(changed, n_fft, n_fft // 4, window=window, length=audio.shape[-1])
