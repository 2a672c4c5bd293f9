"""Sampling of target and negative speakers: random, in-batch, or stratified into easy, medium and hard ones."""

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
"""Two speakers with at least this cosine may be one person with two labels; they are never negatives."""
NAMES = ("easy", "medium", "hard")
_NEAREST = ((0, 1, 2), (1, 2, 0), (2, 1, 0))  # for each stratum: itself, then the nearest others


class Strata(BaseModel):
    """Fractions and cosine thresholds of easy, medium and hard speakers."""

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
        """`count` divided by the ratios with the largest-remainder method: 8 gives 3, 3, 2."""
        ratios = (self.ratio_easy, self.ratio_medium, self.ratio_hard)
        whole = [int(ratio * count + 1e-9) for ratio in ratios]
        order = sorted(range(3), key=lambda s: whole[s] - ratios[s] * count)
        for s in order[: count - sum(whole)]:
            whole[s] += 1
        return whole[0], whole[1], whole[2]


def draw_strata(
    cosine: Tensor, legal: Tensor, count: int, strata: Strata, draw: torch.Generator, state: Callable[[str], None]
) -> Tensor:
    """Indices (M, count) of candidates: easy ones, then medium, then hard ones; -1 in rows without a legal candidate.

    An empty stratum is replaced by the nearest one that is not empty.

    Args:
        cosine: (M, C), of each row to each candidate.
        legal: (M, C), True for candidates that may be drawn.
        count: number of draws per row.
        strata: fractions and thresholds.
        draw: the random generator.
        state: called with a message for each kind of replacement.
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
    """`count` members of each row (M, C), those with the largest random keys (M, C); -1 in a row without members.

    No member is drawn twice before all are drawn once; without `again`, none is drawn twice, and -1 fills the rest.
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
_REDRAWS = 32  # of targets that are the anchor's own speaker, or a near-duplicate of it

_log = logging.getLogger(__name__)


class EmbeddingPool(Protocol):
    """Embeddings to sample from, one per row: speakers, or the utterances of a bank (`snac_core.speakers.index`)."""

    def __len__(self) -> int: ...

    @property
    def speakers(self) -> int:
        """Number of speakers."""

    def vectors(self, rows: Tensor) -> Tensor:
        """Unit embeddings (K, S) of rows (K,)."""

    def labels(self, rows: Tensor) -> Tensor:
        """Speaker labels of rows, as integers of the same shape."""

    def candidates(self, queries: list[Tensor], hard: bool, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Candidate rows (M, C) or (1, C), and their cosines (M, C) to each of the queries (M, S).

        All rows of a small pool; else random rows, and with `hard` also the nearest to the first queries.
        """


@dataclass(frozen=True)
class SpeakerTable:
    """Embeddings of the training speakers by one encoder.

    Attributes:
        names: of the P speakers, sorted.
        conditioning: (P, S), of unit norm; strategies are conditioned with them.
        reference: (P, S), of unit norm, from other audio than `conditioning`; outputs are compared with them.
        encoder: digest of the encoder.
        parts: (P, K, S), of unit norm, of the K parts of the audio that `reference` is the mean of; or None.
        shuffled: whether `conditioning` has the embeddings of other speakers, as a control.
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
        """Row indices (len(speakers),) of speakers.

        Raises:
            UserError: for an unknown speaker.
        """
        index = {name: row for row, name in enumerate(self.names)}
        for speaker in speakers:
            if speaker not in index:
                raise UserError(f"no embedding of speaker {speaker!r}{nearest(speaker, self.names)}")
        return torch.tensor([index[speaker] for speaker in speakers])

    def vectors(self, rows: Tensor) -> Tensor:
        """References (K, S)."""
        return self.reference[rows]

    def positives(self, rows: Tensor) -> Tensor:
        """Positives (M, K, S) of the speakers (M,), from other audio than `conditioning`."""
        return self.reference[rows].unsqueeze(1) if self.parts is None else self.parts[rows]

    def labels(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def candidates(self, queries: list[Tensor], hard: bool, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """All speakers (1, P), and their exact cosines (M, P)."""
        return torch.arange(len(self)).unsqueeze(0), [of @ self.reference.T for of in queries]


@dataclass(frozen=True)
class _Draws:
    """A draw of `count` rows per item, as "targets" or "negatives" of a step; with `repeat`, few rows are repeated."""

    purpose: str
    step: int
    count: int
    strata: Strata
    repeat: bool


class SpeakerSampler:
    """Samples targets and negatives; every draw depends on (seed, step, purpose) alone.

    Args:
        pool: the speakers (a table), or the utterances of a bank.
        seed: of the run.

    Attributes:
        notes: one sentence per kind of replacement, e.g. of an empty stratum; also logged, once each.
    """

    def __init__(self, pool: EmbeddingPool, seed: int) -> None:
        if pool.speakers < 2:
            raise UserError(f"converting needs at least 2 training speakers; got {pool.speakers}")
        self.pool = pool
        self.seed = seed
        self.notes: list[str] = []

    @property
    def table(self) -> SpeakerTable:
        """The embeddings of the speakers.

        Raises:
            UserError: if the sampler draws from the utterances of a bank.
        """
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
        draws = _Draws("targets", step, count, strata or Strata(), repeat=True)
        rows = self._draw(choice, draws, [queries], avoid, anchors)
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
        draws = _Draws("negatives", step, count, strata or Strata(), repeat=False)
        return self._draw(choice, draws, queries, avoid, batch)

    def _draw(self, choice: Choice, draws: _Draws, queries: list[Tensor], avoid: Tensor, batch: Tensor) -> Tensor:
        """(M, count) rows, or -1: of none of the labels `avoid` (M, A), and no near-duplicates of `queries` (M, S)."""
        if choice not in CHOICES:
            raise UserError(f"unknown choice {choice!r}{nearest(str(choice), CHOICES)}")
        purpose, count, strata = draws.purpose, draws.count, draws.strata
        draw = self._generator(draws.step, purpose if choice == "random" else f"{choice} {purpose}")
        if choice == "in_batch":
            rows = torch.unique(batch).unsqueeze(0)
            vectors = self.pool.vectors(rows[0])
            cosines = [of @ vectors.T for of in queries]
        else:
            rows, cosines = self.pool.candidates(queries, choice == "stratified", draw)
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
            places = draw_distinct(legal, count, torch.rand(legal.shape, generator=draw), again=draws.repeat)
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
