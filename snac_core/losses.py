"""Loss terms that objectives are made of: differentiable functions of audio and embeddings.

Losses between speaker embeddings of unit norm.

How likely codes are, given a latent: what a latent must become for the quantizer to choose them.

How far a latent is from what its codes stand for.

How far speech is from another recording of the same words, whatever their timing.

Distances between waveforms: multi-scale STFT and log-mel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core.codec.vq import ResidualVectorQuantize, VectorQuantize
from snac_core.spectral import magnitude_spectrum, mel_filterbank, power_spectrum, stft


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine, per row: (M, S) and (M, S) to (M,)."""
    return 1 - F.cosine_similarity(a, b, dim=-1)


def contrastive(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE: the output must be closer to its positive than to its negatives (van den Oord et al. 2018, eq. 4).

    With several positives it is the mean of each one's term, outside of the logarithm, as supervised contrastive
    learning has it (Khosla et al. 2020, eq. 2); a positive is never held against another one.

    Args:
        outputs: (M, S) embeddings of the converted audio.
        positives: (M, S), or (M, P, S), of the target speakers, from other audio; detached here, so that the metric
            cannot be moved.
        negatives: (M, N, S); detached here.
        mask: (M, N), True where a negative counts.
        temperature: divides the cosines.

    Returns:
        scalar; rows without a negative count as zero.
    """
    positive = torch.einsum("ms,mps->mp", outputs, _several(positives).detach()) / temperature
    negative = torch.einsum("ms,mns->mn", outputs, negatives.detach()) / temperature
    against = negative.masked_fill(~mask, float("-inf")).unsqueeze(1).expand(-1, positive.shape[1], -1)
    logits = torch.cat([positive.unsqueeze(2), against], dim=2).flatten(0, 1)  # (M * P, 1 + N)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=outputs.device))


def margin_ranking(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor, *, margin: float) -> Tensor:
    """Hinge on distances: relu(margin + d(positive) - d(negative)), the mean over the pairs that count.

    With d = 1 - cosine: zero once every negative is farther than the positive by `margin`. Shapes as `contrastive`.
    """
    positive = cosine_distance(outputs.unsqueeze(1), _several(positives).detach()).unsqueeze(2)  # (M, P, 1)
    negative = cosine_distance(outputs.unsqueeze(1), negatives.detach()).unsqueeze(1)  # (M, 1, N)
    hinge = F.relu(margin + positive - negative).mean(1)
    return (hinge * mask).sum() / mask.sum().clamp(min=1)


def _several(positives: Tensor) -> Tensor:
    """(M, S) or (M, P, S) to (M, P, S)."""
    return positives.unsqueeze(1) if positives.dim() == 2 else positives


def code_entropy(
    quantizer: ResidualVectorQuantize, z: Tensor, codes: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Cross-entropy of the quantizer's choice against codes that it should choose, per item.

    A code is chosen by the direction of an encoding, so the logits are the cosines to all entries, divided by the
    temperature. Every level looks at what the wanted codes of the levels before it leave (teacher forcing). Unlike the
    straight-through gradient this sees which entry is chosen, and which would be next.

    Args:
        quantizer: of the codec.
        z: (B, C, F), the latent to be quantized.
        codes: one (B, F / stride) per level, wanted.
        temperature: of the softmax over entries.

    Returns:
        (B,), in nats: means over frames and levels. Its gradient moves `z`, and no entry.
    """
    residual, terms = z, []
    for level, indices in zip(quantizer.quantizers, codes, strict=True):
        assert isinstance(level, VectorQuantize)
        directions = F.normalize(level.project(residual), dim=1)
        logits = torch.einsum("bdf,nd->bnf", directions, F.normalize(level.codebook.weight).detach()) / temperature
        terms.append(F.cross_entropy(logits, indices, reduction="none").mean(1))
        residual = residual - level.expand(level.codebook(indices).transpose(1, 2)).detach()
    return torch.stack(terms).mean(0)


def commitment(quantizer: ResidualVectorQuantize, z: Tensor, codes: Sequence[Tensor]) -> Tensor:
    """Squared distance of encodings to their entries, relative to the entries' size: mean over items and levels.

    The commitment term of van den Oord et al. 2017 (eq. 3), per level, for a frozen codebook. The straight-through
    gradient of the quantizer does not see rounding, so nothing else keeps an edited latent where the codebooks are.

    Args:
        quantizer: of the codec.
        z: (B, C, F), the latent that was quantized.
        codes: one (B, F / stride) per level, what it was quantized to.

    Returns:
        a scalar, 0 where every encoding is its entry; its gradient moves `z`, and no entry.
    """
    residual, distances = z, []
    for level, indices in zip(quantizer.quantizers, codes, strict=True):
        assert isinstance(level, VectorQuantize)
        entry = level.codebook(indices).transpose(1, 2).detach()
        distances.append((level.project(residual) - entry).square().mean() / entry.square().mean())
        residual = residual - level.expand(entry).detach()
    return torch.stack(distances).mean()


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
        source: as `estimate` of `aligned_distance`.
        target: as there.
        lengths: as there.
        sample_rate: as there, in Hz.
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
    power = power_spectrum(audio.squeeze(1), window, hop, padding="constant") + FLOOR**2
    filters = _filters(_MELS, size, sample_rate) + 1e-8  # narrow filters may contain no bin
    mel: Tensor = filters.to(audio) @ power
    return 0.5 * mel.log10()


FLOOR = 1e-5
"""Magnitudes below -100 dB count as silence in the logarithm."""


class MultiScaleSTFT(nn.Module):
    """Mean L1 distance of magnitudes plus that of log-magnitudes, over several window lengths.

    Args:
        n_ffts: window lengths in samples; Hann windows, hop a quarter of the window.

    Source: the spectral terms of Yamamoto et al. 2020 (Parallel WaveGAN), with L1 in both domains.
    """

    def __init__(self, n_ffts: Sequence[int] = (1024, 2048, 4096)) -> None:
        super().__init__()
        self.n_ffts = tuple(n_ffts)
        for n_fft in self.n_ffts:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def magnitudes(self, audio: Tensor, n_fft: int) -> Tensor:
        """(B, 1, T) to (B, n_fft / 2 + 1, frames). Short audio is padded to one window."""
        wave = audio.squeeze(1)
        if wave.shape[-1] < n_fft:
            wave = nn.functional.pad(wave, (0, n_fft - wave.shape[-1]))
        window = self.get_buffer(f"window_{n_fft}")
        return magnitude_spectrum(wave, window, n_fft // 4, padding="constant", floor=FLOOR)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """(B, 1, T) twice to a scalar."""
        total = estimate.new_zeros(())
        for n_fft in self.n_ffts:
            got, wanted = self.magnitudes(estimate, n_fft), self.magnitudes(target, n_fft)
            total = total + (got - wanted).abs().mean() + (got.log10() - wanted.log10()).abs().mean()
        return total / len(self.n_ffts)


def mel_distance(estimate: Tensor, target: Tensor, sample_rate: int, *, n_mels: int = 80) -> Tensor:
    """Mean absolute difference of log10 mel spectra, per item: (B, 1, T) twice to (B,).

    Windows of 64 ms with a hop of 16 ms, Slaney filters up to half the rate.
    """
    n_fft = 2 ** round(math.log2(0.064 * sample_rate))
    window, filters = torch.hann_window(n_fft), _filters(n_mels, n_fft, sample_rate)

    def log_mel(audio: Tensor) -> Tensor:
        magnitudes = stft(audio.squeeze(1).cpu().float(), window, n_fft // 4, padding="reflect").abs()
        return (magnitudes.mT @ filters.T).clamp(min=FLOOR).log10()

    got, wanted = log_mel(estimate), log_mel(target)
    distance: Tensor = (got - wanted).abs().mean(dim=(1, 2))
    return distance


@lru_cache(maxsize=8)
def _filters(bands: int, n_fft: int, sample_rate: int) -> Tensor:
    return mel_filterbank(bands, n_fft, sample_rate)
