"""Who to convert to, and who to tell apart from: the one sampler of every strategy and objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snac_core.errors import UserError, nearest
from snac_core.seeding import generator

NEAR_DUPLICATE = 0.85
"""Cosine above which two speakers may be one person under two labels; such a pair is never a negative."""


@dataclass(frozen=True)
class SpeakerTable:
    """Embeddings of the training speakers by one encoder.

    Attributes:
        names: of the P speakers, sorted.
        conditioning: (P, S) unit norm; what a strategy is conditioned with.
        reference: (P, S) unit norm, from other audio than `conditioning`; what its output is compared with.
        encoder: digest of the encoder.
    """

    names: tuple[str, ...]
    conditioning: Tensor
    reference: Tensor
    encoder: str

    def rows(self, speakers: Sequence[str]) -> Tensor:
        """Row numbers (len(speakers),) of these speakers."""
        index = {name: row for row, name in enumerate(self.names)}
        for speaker in speakers:
            if speaker not in index:
                raise UserError(f"no embedding of speaker {speaker!r}{nearest(speaker, self.names)}")
        return torch.tensor([index[speaker] for speaker in speakers])


class SpeakerSampler:
    """Draws targets and negatives; every draw depends on (seed, step, purpose) alone.

    Args:
        table: the speakers to draw from.
        seed: of the run.
    """

    def __init__(self, table: SpeakerTable, seed: int) -> None:
        if len(table.names) < 2:
            raise UserError(f"converting needs at least 2 training speakers; got {len(table.names)}")
        self.table = table
        self.seed = seed

    def targets(self, anchors: Tensor, step: int, count: int) -> Tensor:
        """For each anchor speaker `count` other speakers, each drawn uniformly: an unbiased mean over all targets.

        Args:
            anchors: rows of the source speakers (B,).
            step: of training.
            count: targets of each source.

        Returns:
            rows (count * B,), anchors fastest; never the anchor itself.
        """
        speakers = len(self.table.names)
        shift = torch.randint(1, speakers, (count, len(anchors)), generator=generator(self.seed, step, "targets"))
        return ((anchors + shift) % speakers).flatten()

    def negatives(self, anchors: Tensor, targets: Tensor, step: int, count: int) -> Tensor:
        """Speakers that the output must not sound like: neither anchor nor target, nor a near-duplicate of the target.

        Args:
            anchors, targets: rows (M,) of the source and target speaker of each output.
            step: of training.
            count: negatives of each output; at least one is legal where there are three distinct speakers.

        Returns:
            rows (M, count), drawn with replacement from what is legal; -1 where an output has no legal negative.
        """
        similarity = self.table.reference[targets] @ self.table.reference.T
        legal = similarity < NEAR_DUPLICATE
        legal.scatter_(1, targets.unsqueeze(1), False)
        legal.scatter_(1, anchors.unsqueeze(1), False)
        possible = legal.any(dim=1)
        weights = torch.where(possible.unsqueeze(1), legal, True).float()
        drawn = torch.multinomial(weights, count, replacement=True, generator=generator(self.seed, step, "negatives"))
        return torch.where(possible.unsqueeze(1), drawn, -1)
