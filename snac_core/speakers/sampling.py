"""Easy, medium and hard: other speakers by how alike their embeddings are, and draws that keep a share of each.

Who to convert to, and who to tell apart from: the one sampler of every strategy and objective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from snac_core.errors import UserError, nearest
from snac_core.seeding import generator

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


Choice = Literal["random", "in_batch", "stratified"]
CHOICES: tuple[Choice, ...] = ("random", "in_batch", "stratified")
_REDRAWS = 32  # of a target that turns out to be the anchor's own speaker, or a near-duplicate of it

_log = logging.getLogger(__name__)


class EmbeddingPool(Protocol):
    """Embeddings to draw from, a row each: speakers, or the utterances of a bank (`snac_core.speakers.index`)."""

    def __len__(self) -> int: ...

    @property
    def speakers(self) -> int:
        """How many speakers there are."""

    def vectors(self, rows: Tensor) -> Tensor:
        """Unit embeddings (K, S) of rows (K,)."""

    def labels(self, rows: Tensor) -> Tensor:
        """Speakers of rows, as whole numbers of the same shape."""

    def candidates(self, queries: list[Tensor], hard: bool, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Rows (M, C) or (1, C) to draw from, and their cosines (M, C) to each of the queries (M, S).

        All rows where they are few; else rows at random, with those nearest to the first queries where `hard` ones are
        wanted.
        """


@dataclass(frozen=True)
class SpeakerTable:
    """Embeddings of the training speakers by one encoder.

    Attributes:
        names: of the P speakers, sorted.
        conditioning: (P, S) unit norm; what a strategy is conditioned with.
        reference: (P, S) unit norm, from other audio than `conditioning`; what its output is compared with.
        encoder: digest of the encoder.
        parts: (P, K, S) unit norm, of K single parts of the audio that `reference` is the mean of; None: only the mean.
        shuffled: whether `conditioning` holds other speakers' embeddings on purpose, as a control.
    """

    names: tuple[str, ...]
    conditioning: Tensor
    reference: Tensor
    encoder: str
    parts: Tensor | None = None
    shuffled: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def speakers(self) -> int:
        """P: every row is a speaker."""
        return len(self.names)

    def indices(self, speakers: Sequence[str]) -> Tensor:
        """Row numbers (len(speakers),) of these speakers."""
        index = {name: row for row, name in enumerate(self.names)}
        for speaker in speakers:
            if speaker not in index:
                raise UserError(f"no embedding of speaker {speaker!r}{nearest(speaker, self.names)}")
        return torch.tensor([index[speaker] for speaker in speakers])

    def vectors(self, rows: Tensor) -> Tensor:
        """References (K, S)."""
        return self.reference[rows]

    def positives(self, rows: Tensor) -> Tensor:
        """What outputs in the voices of rows (M,) should sound like, (M, K, S); nothing that conditions is among it."""
        return self.reference[rows].unsqueeze(1) if self.parts is None else self.parts[rows]

    def labels(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def candidates(self, queries: list[Tensor], hard: bool, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """All speakers (1, P), and their exact cosines (M, P)."""
        return torch.arange(len(self)).unsqueeze(0), [of @ self.reference.T for of in queries]


class SpeakerSampler:
    """Draws targets and negatives; every draw depends on (seed, step, purpose) alone.

    Args:
        pool: the speakers (a table), or the utterances of a bank, to draw from.
        seed: of the run.

    Attributes:
        notes: what was drawn instead of what was asked for, a sentence each; also logged, once each.
    """

    def __init__(self, pool: EmbeddingPool, seed: int) -> None:
        if pool.speakers < 2:
            raise UserError(f"converting needs at least 2 training speakers; got {pool.speakers}")
        self.pool = pool
        self.seed = seed
        self.notes: list[str] = []

    @property
    def table(self) -> SpeakerTable:
        """The speakers' embeddings, which condition and teach."""
        if not isinstance(self.pool, SpeakerTable):
            raise UserError(
                "this sampler draws from the utterances of a bank; conditioning needs its table of speakers"
            )
        return self.pool

    def targets(
        self, anchors: Tensor, step: int, count: int, *, choice: Choice = "random", strata: Strata | None = None
    ) -> Tensor:
        """For each anchor `count` rows of other speakers: by default uniform, an unbiased mean over all targets.

        Args:
            anchors: rows of the source speakers (B,).
            step: of training.
            count: targets of each source.
            choice: "random"; "in_batch": from the other anchors; "stratified": a share of easy, medium and hard ones.
            strata: shares and limits of the stratified choice; the defaults when not given.

        Returns:
            rows (count * B,), anchors fastest; never of the anchor's own speaker, and no near-duplicate of it unless
            there is nobody else.
        """
        if choice == "random":
            return self._random_targets(anchors, step, count)
        queries, avoid = self.pool.vectors(anchors), self.pool.labels(anchors).unsqueeze(1)
        rows = self._chosen(choice, [queries], avoid, anchors, step, count, strata, "targets", again=True)
        drawn = rows.T.flatten()
        if bool((drawn >= 0).all()):
            return drawn
        self._state(f"no {choice} target for some speakers: theirs are drawn at random")
        return torch.where(drawn < 0, self._random_targets(anchors, step, count), drawn)

    def negatives(
        self,
        anchors: Tensor,
        targets: Tensor,
        step: int,
        count: int,
        *,
        choice: Choice = "random",
        strata: Strata | None = None,
    ) -> Tensor:
        """Rows that the output must not sound like: of neither anchor's nor target's speaker, nor near-duplicates.

        Args:
            anchors: rows (M,) of the source speaker of each output.
            targets: rows (M,) of the target speaker of each output.
            step: of training.
            count: negatives of each output; at least one is legal where there are three distinct speakers.
            choice: "random" with replacement; "in_batch": anchors and targets of the other outputs, each at most once;
                "stratified": a share of easy, medium and hard ones, by cosine to the target.
            strata: shares and limits of the stratified choice; the defaults when not given.

        Returns:
            rows (M, count); -1 where an output has no (or, in the batch, no further) legal negative.
        """
        queries = [self.pool.vectors(targets), self.pool.vectors(anchors)]
        avoid = torch.stack([self.pool.labels(anchors), self.pool.labels(targets)], dim=1)
        batch = torch.cat([anchors, targets])
        return self._chosen(choice, queries, avoid, batch, step, count, strata, "negatives", again=False)

    def _chosen(
        self,
        choice: Choice,
        queries: list[Tensor],
        avoid: Tensor,
        batch: Tensor,
        step: int,
        count: int,
        strata: Strata | None,
        purpose: str,
        *,
        again: bool,
    ) -> Tensor:
        """(M, count) rows, or -1: of none of the labels `avoid` (M, A), and no near-duplicates of `queries` (M, S)."""
        if choice not in CHOICES:
            raise UserError(f"unknown choice {choice!r}{nearest(str(choice), CHOICES)}")
        draw = self._generator(step, purpose if choice == "random" else f"{choice} {purpose}")
        if choice == "in_batch":
            rows = torch.unique(batch).unsqueeze(0)
            vectors = self.pool.vectors(rows[0])
            cosines = [of @ vectors.T for of in queries]
        else:
            rows, cosines = self.pool.candidates(queries, choice == "stratified", draw)
        strata = strata or Strata()
        limit = strata.same_speaker_threshold if choice == "stratified" else NEAR_DUPLICATE
        legal = cosines[0] < limit
        for others in cosines[1:]:
            legal &= others < limit
        labels = self.pool.labels(rows)
        for label in avoid.unbind(1):
            legal &= labels != label.unsqueeze(1)
        if not bool(legal.any(dim=1).all()):
            self._state(f"some speakers have no legal {choice} {purpose[:-1]}")
        if choice == "stratified":
            places = draw_strata(cosines[0], legal, count, strata, draw, self._state)
        elif choice == "in_batch":
            places = draw_distinct(legal, count, torch.rand(legal.shape, generator=draw), again=again)
        else:
            places = self._uniform(legal, count, draw)
        found = rows.expand(len(places), -1).gather(1, places.clamp(min=0))
        return torch.where(places < 0, -1, found)

    def _uniform(self, legal: Tensor, count: int, draw: torch.Generator) -> Tensor:
        possible = legal.any(dim=1, keepdim=True)
        places = torch.multinomial(torch.where(possible, legal, True).float(), count, replacement=True, generator=draw)
        return torch.where(possible, places, -1)

    def _random_targets(self, anchors: Tensor, step: int, count: int) -> Tensor:
        """(count * B,): a row that is not the anchor, drawn again while it is of its speaker or a near-duplicate."""
        draw = self._generator(step, "targets")
        own, source = self.pool.labels(anchors).repeat(count), self.pool.vectors(anchors).repeat(count, 1)
        size, rows = len(self.pool), torch.empty(0, dtype=torch.long)
        again = torch.ones(count * len(anchors), dtype=torch.bool)
        for _ in range(_REDRAWS):
            shift = torch.randint(1, size, (count, len(anchors)), generator=draw)
            drawn = ((anchors + shift) % size).flatten()
            rows = torch.where(again, drawn, rows) if len(rows) else drawn
            same = self.pool.labels(rows) == own
            again = same | ((self.pool.vectors(rows) * source).sum(1) >= NEAR_DUPLICATE)
            if not bool(again.any()):
                return rows
        self._state("near-duplicates of some speakers are their targets: there is hardly anybody else")
        for place in same.nonzero().flatten().tolist():  # a speaker with nearly all of the rows
            others = self.pool.labels(torch.arange(size)) != own[place]
            rows[place] = int(others.nonzero()[int(rows[place]) % int(others.sum())])
        return rows

    def _generator(self, step: int, purpose: str) -> torch.Generator:
        return generator(self.seed, step, purpose)

    def _state(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            _log.warning("%s", note)
