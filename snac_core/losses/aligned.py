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
    hop = _window(sample_rate) // 4
    got, wanted = (_log_mel(audio, sample_rate, hop) for audio in (estimate, target))  # (M, mels, K), (M, mels, J)
    with torch.no_grad():
        one, other = (x - x.mean(1, keepdim=True) for x in (got, wanted))
        path = _path(one, other, _counting(lengths, hop, wanted))
    along = wanted.gather(2, path.unsqueeze(1).expand(-1, _MELS, -1))
    return (got - along).abs().mean(dim=(1, 2)) * (lengths.to(got.device) > 0)


@torch.no_grad()
def alignment(source: Tensor, target: Tensor, lengths: Tensor, sample_rate: int, *, hop: int) -> Tensor:
    """Which frame of another speaker's recording of the same words each frame of the source is.

    As in `aligned_distance`, on log mel spectra without their level and without the mean of every band over time, which
    is most of what two voices differ in.

    Args:
        source, target, lengths, sample_rate: as `estimate` and so on of `aligned_distance`.
        hop: samples of a frame.

    Returns:
        (M, K) frames of the target, never going back, for the K = T / hop (rounded down, at least 1) frames of the
        source; any frame where there is no target.
    """
    spectra = (_log_mel(x, sample_rate, hop)[..., : max(1, x.shape[-1] // hop)] for x in (source, target))
    one, other = (x - x.mean(1, keepdim=True) for x in spectra)
    there = _counting(lengths, hop, other)
    means = (other * there.unsqueeze(1)).sum(2, keepdim=True) / there.sum(1).clamp(min=1)[:, None, None]
    return _path(one - one.mean(2, keepdim=True), other - means, there)


def _counting(lengths: Tensor, hop: int, spectra: Tensor) -> Tensor:
    """(M, J), True for the frames of spectra (M, mels, J) that lie within lengths (M,) in samples."""
    return torch.arange(spectra.shape[-1], device=spectra.device) * hop < lengths.to(spectra.device)[:, None]


def _path(one: Tensor, other: Tensor, there: Tensor) -> Tensor:
    """The best path (M, K) of spectra (M, mels, K) through spectra (M, mels, J), of which the frames `there` count."""
    cost = torch.cdist(one.transpose(1, 2), other.transpose(1, 2), p=1) / _MELS
    return _best_path(cost.masked_fill(~there.unsqueeze(1), float("inf")))


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


def _window(sample_rate: int) -> int:
    return 4 * round(0.016 * sample_rate)


def _log_mel(audio: Tensor, sample_rate: int, hop: int) -> Tensor:
    """(M, 1, T) to log10 mel magnitudes (M, mels, T // hop + 1); windows of 64 ms."""
    size = _window(sample_rate)
    window = torch.hann_window(size, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(audio.squeeze(1), size, hop, window=window, return_complex=True, pad_mode="constant")
    power = spectrum.real.square() + spectrum.imag.square() + FLOOR**2
    mel: Tensor = _filters(sample_rate, size // 2 + 1).to(audio) @ power
    return 0.5 * mel.log10()


@lru_cache(maxsize=4)
def _filters(sample_rate: int, bins: int) -> Tensor:
    """(mels, bins)."""
    made: Tensor = torchaudio.functional.melscale_fbanks(
        bins, 0.0, sample_rate / 2, _MELS, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return made.T + 1e-8  # narrow filters may hold no bin
