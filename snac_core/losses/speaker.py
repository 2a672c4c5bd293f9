"""Losses between speaker embeddings of unit norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
