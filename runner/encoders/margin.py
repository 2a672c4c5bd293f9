"""Additive angular margin softmax (Deng et al. 2019, arXiv 1801.07698), the loss of speaker classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AngularMargin(nn.Module):
    """Cross-entropy over cosines to one centre per class, the own class's angle enlarged by a margin."""

    def __init__(self, dim: int, classes: int, *, scale: float = 30.0, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.centres = nn.Parameter(torch.randn(classes, dim, generator=generator) / dim**0.5)

    def forward(self, embedding: Tensor, label: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """Loss, and share of items whose nearest centre is their own.

        Args:
            embedding: (B, S), any norm.
            label: (B,) class of each item.
            margin: in radians, added to the angle between an item and its own centre.
        """
        cosine = nn.functional.normalize(embedding) @ nn.functional.normalize(self.centres).T
        own = cosine.gather(1, label[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        # Past pi - margin the cosine would rise again; there the angle is left and the cosine lowered instead.
        harder = torch.where(own > -torch.cos(torch.tensor(margin)), (own.acos() + margin).cos(), own - margin**2)
        logits = self.scale * cosine.scatter(1, label[:, None], harder)
        accuracy = (cosine.argmax(1) == label).float().mean()
        return nn.functional.cross_entropy(logits, label), accuracy
