"""Easy, medium and hard: other speakers by how alike their embeddings are, and draws that keep a share of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

NEAR_DUPLICATE = 0.85
"""Cosine from which on two speakers may be one person under two labels; such a pair is never told apart."""
NAMES = ("easy", "medium", "hard")
_NEAREST = ((0, 1, 2), (1, 2, 0), (2, 1, 0))  # where to look for each stratum: itself, then the nearest


class Strata(BaseModel):
    """Shares and limits of easy, medium and hard, by cosine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio_easy: float = Field(0.3, ge=0, le=1, description="Share of easy ones.")
    ratio_medium: float = Field(0.4, ge=0, le=1, description="Share of medium ones.")
    ratio_hard: float = Field(0.3, ge=0, le=1, description="Share of hard ones.")
    threshold_easy_medium: float = Field(0.3, ge=-1, le=1, description="Cosine below which a speaker is easy.")
    threshold_medium_hard: float = Field(0.6, ge=-1, le=1, description="Cosine from which on a speaker is hard.")
    same_speaker_threshold: float = Field(
        NEAR_DUPLICATE, ge=-1, le=1.01, description="Cosine from which on it may be the same speaker: never drawn."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = self.ratio_easy + self.ratio_medium + self.ratio_hard
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the ratios of easy, medium and hard add up to {total:g}; expected 1")
        if not self.threshold_easy_medium < self.threshold_medium_hard < self.same_speaker_threshold:
            raise ValueError(
                "expected threshold_easy_medium < threshold_medium_hard < same_speaker_threshold, got "
                f"{self.threshold_easy_medium:g}, {self.threshold_medium_hard:g}, {self.same_speaker_threshold:g}"
            )
        return self

    def quota(self, count: int) -> tuple[int, int, int]:
        """`count` shared out by the ratios, the rest to the largest remainders: 8 gives 3, 3, 2."""
        ratios = (self.ratio_easy, self.ratio_medium, self.ratio_hard)
        whole = [int(ratio * count + 1e-9) for ratio in ratios]
        order = sorted(range(3), key=lambda s: whole[s] - ratios[s] * count)
        for s in order[: count - sum(whole)]:
            whole[s] += 1
        return whole[0], whole[1], whole[2]


def draw_strata(
    cosine: Tensor, legal: Tensor, count: int, strata: Strata, draw: torch.Generator, state: Callable[[str], None]
) -> Tensor:
    """Places (M, count) of candidates: the easy ones first, then medium, then hard; -1 in rows without a legal one.

    A stratum that is empty for a row is replaced by the nearest that is not.

    Args:
        cosine: (M, C) of each row to each candidate.
        legal: (M, C) which candidates may be drawn.
        count: how many for each row.
        strata: shares and limits.
        draw: of the random numbers.
        state: called with a sentence for each kind of replacement.
    """
    stratum = (cosine >= strata.threshold_easy_medium).long() + (cosine >= strata.threshold_medium_hard).long()
    members = [legal & (stratum == s) for s in range(3)]
    filled = torch.stack([member.any(dim=1) for member in members])  # (3, M)
    keys = torch.rand(cosine.shape, generator=draw)
    drawn = []
    for wanted, share in enumerate(strata.quota(count)):
        if not share:
            continue
        chosen, there = members[wanted], filled[wanted]
        for other in _NEAREST[wanted][1:]:
            if bool(there.all()):
                break
            lacking = ~there
            if bool((lacking & filled[other]).any()):
                state(f"no {NAMES[wanted]} ones for some speakers: {NAMES[other]} ones are drawn instead")
            chosen, there = torch.where(lacking.unsqueeze(1), members[other], chosen), there | filled[other]
        drawn.append(draw_distinct(chosen, share, keys.roll(7 * wanted, 1)))  # other keys, should two strata be one
    return torch.cat(drawn, dim=1)


def draw_distinct(members: Tensor, count: int, keys: Tensor, *, again: bool = True) -> Tensor:
    """`count` members of each row (M, C), those of the largest random keys (M, C); -1 in a row that has none.

    No member comes twice before all have come once; with `again` off none comes twice, and -1 fills up.
    """
    best, places = torch.where(members, keys, -1.0).topk(min(count, members.shape[1]), dim=1)
    there = (best >= 0).sum(dim=1, keepdim=True)
    turn = torch.arange(count).expand(len(members), count)
    if again:
        places = places.gather(1, turn % there.clamp(min=1))
        return torch.where(there > 0, places, -1)
    places = torch.nn.functional.pad(places, (0, count - places.shape[1]))
    return torch.where(turn < there, places, -1)
