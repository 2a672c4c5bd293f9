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

    Args:
        outputs: (M, S) embeddings of the converted audio.
        positives: (M, S) of the target speakers, from other audio; detached here, so that the metric cannot be moved.
        negatives: (M, N, S); detached here.
        mask: (M, N), True where a negative counts.
        temperature: divides the cosines.

    Returns:
        scalar; rows without a negative count as zero.
    """
    positive = (outputs * positives.detach()).sum(-1, keepdim=True)
    negative = torch.einsum("ms,mns->mn", outputs, negatives.detach()).masked_fill(~mask, float("-inf"))
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(outputs), dtype=torch.long, device=outputs.device))


def margin_ranking(outputs: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor, *, margin: float) -> Tensor:
    """Hinge on distances: relu(margin + d(positive) - d(negative)), the mean over the negatives that count.

    With d = 1 - cosine: zero once every negative is farther than the positive by `margin`. Shapes as `contrastive`.
    """
    positive = cosine_distance(outputs, positives.detach()).unsqueeze(1)
    negative = cosine_distance(outputs.unsqueeze(1), negatives.detach())
    hinge = F.relu(margin + positive - negative)
    return (hinge * mask).sum() / mask.sum().clamp(min=1)
