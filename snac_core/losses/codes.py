"""How likely codes are, given a latent: what a latent must become for the quantiser to choose them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core.codec.vq import ResidualVectorQuantize, VectorQuantize


def code_entropy(
    quantizer: ResidualVectorQuantize, z: Tensor, codes: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Cross-entropy of the quantiser's choice against codes that it should choose, per item.

    A code is chosen by the direction of an encoding, so the logits are the cosines to all entries, divided by the
    temperature. Every level looks at what the wanted codes of the levels before it leave (teacher forcing). Unlike the
    straight-through gradient this sees which entry is chosen, and which would be next.

    Args:
        quantizer: of the codec.
        z: (B, C, F), the latent to be quantised.
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
