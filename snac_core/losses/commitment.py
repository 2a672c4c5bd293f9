"""How far a latent is from what its codes stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snac_core.codec.vq import ResidualVectorQuantize, VectorQuantize


def commitment(quantizer: ResidualVectorQuantize, z: Tensor, codes: Sequence[Tensor]) -> Tensor:
    """Squared distance of encodings to their entries, relative to the entries' size: mean over items and levels.

    The commitment term of van den Oord et al. 2017 (eq. 3), per level, for a frozen codebook. The straight-through
    gradient of the quantiser does not see rounding, so nothing else keeps an edited latent where the codebooks are.

    Args:
        quantizer: of the codec.
        z: (B, C, F), the latent that was quantised.
        codes: one (B, F / stride) per level, what it was quantised to.

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
