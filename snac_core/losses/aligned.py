"""How far speech is from another recording of the same words, whatever their timing."""

from __future__ import annotations

from functools import lru_cache

import torch
import torchaudio
from torch import Tensor

from snac_core.losses.spectral import FLOOR

_MELS = 40
_STEPS = (0, 1, 2)  # target frames that one frame may go on by: half to twice the target's speed, and pauses


def aligned_distance(estimate: Tensor, target: Tensor, lengths: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of log10 mel spectra along the best alignment with a part of the target, per item.

    The alignment is dynamic time warping that may begin and end anywhere in the target (Mueller 2007, section 7.2), on
    spectra without their level; it carries no gradient, the distance along it does.

    Args:
        estimate: (M, 1, T).
        target: (M, 1, T'), the same words, and maybe more before and after; padded at the end.
        lengths: (M,) samples of each target that count; 0: there is none.
        sample_rate: in Hz.

    Returns:
        (M,), in bels; 0 where there is no target.
    """
    got, wanted = (_log_mel(audio, sample_rate) for audio in (estimate, target))  # (M, mels, K), (M, mels, J)
    hop = _hop(sample_rate)
    there = torch.arange(wanted.shape[-1], device=wanted.device) * hop < lengths.to(wanted.device)[:, None]
    with torch.no_grad():
        one, other = ((x - x.mean(1, keepdim=True)).transpose(1, 2) for x in (got, wanted))
        cost = torch.cdist(one, other, p=1) / _MELS
        path = _best_path(cost.masked_fill(~there.unsqueeze(1), float("inf")))
    along = wanted.gather(2, path.unsqueeze(1).expand(-1, _MELS, -1))
    return (got - along).abs().mean(dim=(1, 2)) * (lengths.to(got.device) > 0)


def _best_path(cost: Tensor) -> Tensor:
    """For costs (M, K, J) of pairing frames, the target frame (M, K) of each frame on the cheapest monotonic path."""
    total, came = cost[:, 0], []
    for row in cost[:, 1:].unbind(1):
        before = torch.stack([torch.nn.functional.pad(total, (step, 0), value=float("inf"))[:, : total.shape[1]]
                              for step in _STEPS])  # fmt: skip
        least, which = before.min(dim=0)
        total = row + least
        came.append(which)
    at = total.argmin(dim=1, keepdim=True)
    path = [at]
    for which in reversed(came):
        at = (at - which.gather(1, at)).clamp(min=0)
        path.append(at)
    return torch.cat(path[::-1], dim=1)


def _hop(sample_rate: int) -> int:
    return round(0.016 * sample_rate)


def _log_mel(audio: Tensor, sample_rate: int) -> Tensor:
    """(M, 1, T) to log10 mel magnitudes (M, mels, frames); windows of 64 ms."""
    hop = _hop(sample_rate)
    window = torch.hann_window(4 * hop, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(audio.squeeze(1), 4 * hop, hop, window=window, return_complex=True, pad_mode="constant")
    power = spectrum.real.square() + spectrum.imag.square() + FLOOR**2
    mel: Tensor = _filters(sample_rate, 2 * hop + 1).to(audio) @ power
    return 0.5 * mel.log10()


@lru_cache(maxsize=4)
def _filters(sample_rate: int, bins: int) -> Tensor:
    """(mels, bins)."""
    made: Tensor = torchaudio.functional.melscale_fbanks(
        bins, 0.0, sample_rate / 2, _MELS, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return made.T + 1e-8  # narrow filters may hold no bin
