"""Differentiable losses for objectives: of speaker embeddings, codes, latents, aligned speech and spectra."""

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
    """1 - cosine similarity, per row: (M, S) and (M, S) to (M,), 0 to 2."""
    return 1 - F.cosine_similarity(a, b, dim=-1)


def contrastive(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE between unit vectors (van den Oord et al. 2018, eq. 4).

    With several positives, the term of each positive is computed alone and averaged, as in supervised contrastive
    learning (Khosla et al. 2020, eq. 2): other positives are not negatives.

    Args:
        outputs: (M, S) embeddings of the converted audio.
        positives: (M, S), or (M, P, S), of the target speakers, from other audio; detached.
        negatives: (M, N, S), of other speakers; detached.
        mask: (M, N), True for valid negatives.
        temperature: divisor of the cosines.

    Returns:
        a scalar, the mean over rows; rows without a valid negative count as zero.
    """
    positive = torch.einsum("ms,mps->mp", outputs, _several(positives).detach()) / temperature
    negative = torch.einsum("ms,mns->mn", outputs, negatives.detach()) / temperature
    against = negative.masked_fill(~mask, float("-inf")).unsqueeze(1).expand(-1, positive.shape[1], -1)
    logits = torch.cat([positive.unsqueeze(2), against], dim=2).flatten(0, 1)  # (M * P, 1 + N)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=outputs.device))


def margin_ranking(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor, *, margin: float) -> Tensor:
    """Hinge loss: relu(margin + d(positive) - d(negative)), the mean over valid pairs, then over rows; a scalar.

    d is 1 - cosine: the loss is zero if every negative is farther than the positive by `margin`. Shapes as in
    `contrastive`; rows without a valid negative count as zero.
    """
    positive = cosine_distance(outputs.unsqueeze(1), _several(positives).detach()).unsqueeze(2)  # (M, P, 1)
    negative = cosine_distance(outputs.unsqueeze(1), negatives.detach()).unsqueeze(1)  # (M, 1, N)
    hinge = F.relu(margin + positive - negative).mean(1)
    return ((hinge * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _several(positives: Tensor) -> Tensor:
    """(M, S) or (M, P, S) to (M, P, S)."""
    return positives.unsqueeze(1) if positives.dim() == 2 else positives


def code_entropy(
    quantizer: ResidualVectorQuantize, z: Tensor, codes: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Cross-entropy between the quantizer's choice and given codes, per item.

    The quantizer chooses the entry with the highest cosine, so the logits are the cosines to all entries, divided by
    the temperature. Each level gets the residual after the given codes of earlier levels (teacher forcing). In contrast
    to the straight-through gradient, this gradient depends on which entry is chosen.

    Args:
        quantizer: of the codec.
        z: (B, C, F), the latent before quantization.
        codes: the given codes, one (B, F / stride) per level.
        temperature: of the softmax over entries.

    Returns:
        (B,), in nats, the mean over frames and levels. Only `z` gets a gradient.
    """
    residual, terms = z, []
    for level, indices in zip(quantizer.quantizers, codes, strict=True):
        assert isinstance(level, VectorQuantize)
        logits = level.cosines(level.project(residual)) / temperature
        terms.append(F.cross_entropy(logits, indices, reduction="none").mean(1))
        residual = residual - level.expand(level.codebook(indices).transpose(1, 2)).detach()
    return torch.stack(terms).mean(0)


def commitment(quantizer: ResidualVectorQuantize, z: Tensor, codes: Sequence[Tensor]) -> Tensor:
    """Squared distance between encodings and their codebook entries, relative to the mean square of an item's entries.

    The commitment term of van den Oord et al. 2017 (eq. 3), per level, for frozen codebooks. The straight-through
    gradient ignores the quantization error, so only this term keeps an edited latent near the codebooks.

    Args:
        quantizer: of the codec.
        z: (B, C, F), the latent before quantization.
        codes: its codes, one (B, F / stride) per level.

    Returns:
        a scalar, the mean over items and levels; only `z` gets a gradient.
    """
    residual, distances = z, []
    for level, indices in zip(quantizer.quantizers, codes, strict=True):
        assert isinstance(level, VectorQuantize)
        entry = level.codebook(indices).transpose(1, 2).detach()
        error = (level.project(residual) - entry).square().mean((1, 2))  # (B,)
        distances.append((error / entry.square().mean((1, 2))).mean())
        residual = residual - level.expand(entry).detach()
    return torch.stack(distances).mean()


_MELS = 40
_STEPS = (0, 1, 2)  # allowed steps in target frames per source frame: pauses, and up to twice the speed


def aligned_distance(estimate: Tensor, target: Tensor, lengths: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of log10 mel spectra along the best alignment with a part of the target, per item.

    The alignment is subsequence dynamic time warping (Mueller 2007, section 7.2): it may start and end anywhere in the
    target. It uses spectra without their level, and has no gradient; the distance along it has. torchaudio and librosa
    have no batched version of it.

    Args:
        estimate: (M, 1, T).
        target: (M, 1, T'), a recording of the same words, possibly with more before and after; padded at the end.
        lengths: (M,) valid samples of each target; 0: no target.
        sample_rate: in Hz.

    Returns:
        (M,), in bels (log10); 0 without a target.
    """
    hop = _window(sample_rate) // 4
    got, wanted = (_log_mel(audio, sample_rate, hop) for audio in (estimate, target))  # (M, mels, K), (M, mels, J)
    with torch.no_grad():
        one, other = (x - x.mean(1, keepdim=True) for x in (got, wanted))
        path = _path(one, other, _valid_frames(lengths, hop, wanted))
    along = wanted.gather(2, path.unsqueeze(1).expand(-1, _MELS, -1))
    return (got - along).abs().mean(dim=(1, 2)) * (lengths.to(got.device) > 0)


@torch.no_grad()
def alignment(source: Tensor, target: Tensor, lengths: Tensor, sample_rate: int, *, hop: int) -> Tensor:
    """Frame-wise alignment with another speaker's recording of the same words.

    As in `aligned_distance`, but the mean of every band over time is removed too: it is most of the difference between
    two voices.

    Args:
        source: as `estimate` of `aligned_distance`.
        target: as valid.
        lengths: as valid.
        sample_rate: as in `aligned_distance`, in Hz.
        hop: samples per frame.

    Returns:
        (M, K) frame indices of the target, monotonic, for the K = max(1, T // hop) frames of the source; arbitrary
        without a target.
    """
    spectra = (_log_mel(x, sample_rate, hop)[..., : max(1, x.shape[-1] // hop)] for x in (source, target))
    one, other = (x - x.mean(1, keepdim=True) for x in spectra)
    valid = _valid_frames(lengths, hop, other)
    means = (other * valid.unsqueeze(1)).sum(2, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    return _path(one - one.mean(2, keepdim=True), other - means, valid)


def _valid_frames(lengths: Tensor, hop: int, spectra: Tensor) -> Tensor:
    """(M, J), True for the frames of spectra (M, mels, J) within lengths (M,) in samples."""
    return torch.arange(spectra.shape[-1], device=spectra.device) * hop < lengths.to(spectra.device)[:, None]


def _path(one: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    """The best path (M, K) of spectra (M, mels, K) through the `valid` frames (M, J) of spectra (M, mels, J)."""
    cost = torch.cdist(one.transpose(1, 2), other.transpose(1, 2), p=1) / _MELS
    return _best_path(cost.masked_fill(~valid.unsqueeze(1), float("inf")))


def _best_path(cost: Tensor) -> Tensor:
    """For costs (M, K, J) of pairs of frames, the target frames (M, K) of the monotonic path with the lowest cost."""
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
"""Floor of magnitudes in logarithms: -100 dB."""


class MultiScaleSTFT(nn.Module):
    """L1 distance of magnitudes plus that of log10 magnitudes, the mean over several window lengths.

    auraloss's `MultiResolutionSTFTLoss`, with the same terms and weights, differs by 4 % on speech-like signals: it
    clamps magnitudes at -80 dB and reflects the audio at its ends.

    Args:
        n_ffts: lengths of the Hann windows in samples; the hop is a quarter of the window.

    Source: the spectral terms of Yamamoto et al. 2020 (Parallel WaveGAN), with L1 in both domains.
    """

    def __init__(self, n_ffts: Sequence[int] = (1024, 2048, 4096)) -> None:
        super().__init__()
        self.n_ffts = tuple(n_ffts)
        for n_fft in self.n_ffts:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def magnitudes(self, audio: Tensor, n_fft: int) -> Tensor:
        """(B, 1, T) to (B, n_fft // 2 + 1, frames). Short audio is padded to one window."""
        wave = audio.squeeze(1)
        if wave.shape[-1] < n_fft:
            wave = nn.functional.pad(wave, (0, n_fft - wave.shape[-1]))
        window = self.get_buffer(f"window_{n_fft}")
        return magnitude_spectrum(wave, window, n_fft // 4, padding="constant", floor=FLOOR)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """(B, 1, T) and (B, 1, T) to a scalar."""
        total = estimate.new_zeros(())
        for n_fft in self.n_ffts:
            got, wanted = self.magnitudes(estimate, n_fft), self.magnitudes(target, n_fft)
            total = total + (got - wanted).abs().mean() + (got.log10() - wanted.log10()).abs().mean()
        return total / len(self.n_ffts)


def mel_distance(estimate: Tensor, target: Tensor, sample_rate: int, *, n_mels: int = 80) -> Tensor:
    """Mean absolute difference of log10 mel spectra, per item: (B, 1, T) and (B, 1, T) to (B,), in bels.

    Hann windows of about 64 ms (a power of two in samples), a hop of a quarter, Slaney filters up to half the rate.
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
