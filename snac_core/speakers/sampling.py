"""Sampling of target and negative speakers: random, in-batch, or stratified into easy, medium and hard ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, Self

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

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
        shift = 7 * wanted if 7 * wanted % cosine.shape[1] else wanted  # other keys, should two strata be one
        drawn.append(draw_distinct(chosen, share, keys.roll(shift, 1)))
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


class Candidates(NamedTuple):
    """Rows of a pool that a draw chooses from.

    Attributes:
        rows: (M, C), or (1, C) if they are the same for all queries; -1: none.
        cosines: (M, C) of the rows to each of the queries.
        of_speakers: (M, C) of the rows' speakers to each of the queries, where these differ from `cosines`.
    """

    rows: Tensor
    cosines: list[Tensor]
    of_speakers: list[Tensor]


class EmbeddingPool(Protocol):
    """Embeddings to draw from: of speakers, or of all their utterances (`snac_core.speakers.index.BankPool`)."""

    def vectors(self, rows: Tensor) -> Tensor:
        """Unit embeddings (..., S) of rows."""

    def speakers_of(self, rows: Tensor) -> Tensor:
        """Rows of the table of speakers, of the same shape."""

    def candidates(self, queries: list[Tensor], avoid: Tensor, draw: torch.Generator) -> Candidates:
        """All rows of a small pool; else random rows, and the nearest to the first queries.

        Args:
            queries: (M, S) each.
            avoid: (M, A) speakers that are not wanted; a candidate may still be of one.
            draw: the random generator.
        """


class Negatives(NamedTuple):
    """Negatives of M outputs; -1 in `rows` and `speakers`: none.

    Attributes:
        rows: (M, N) of what they are drawn from, the speakers or their utterances.
        speakers: (M, N) rows of the table.
        embeddings: (M, N, S), of unit norm.
    """

    rows: Tensor
    speakers: Tensor
    embeddings: Tensor


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

    def speakers_of(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def candidates(self, queries: list[Tensor], avoid: Tensor, draw: torch.Generator) -> Candidates:
        """All speakers (1, P), and their exact cosines (M, P)."""
        return Candidates(torch.arange(len(self)).unsqueeze(0), [of @ self.reference.T for of in queries], [])


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
        table: the speakers.
        seed: of the run.
        utterances: returns what stratified choices draw from instead of the table, or None; called at the first such
            draw.

    Attributes:
        notes: one sentence per kind of replacement, e.g. of an empty stratum; also logged, once each.
    """

    def __init__(
        self, table: SpeakerTable, seed: int, utterances: Callable[[], EmbeddingPool | None] | None = None
    ) -> None:
        if len(table) < 2:
            raise UserError(f"converting needs at least 2 training speakers; got {len(table)}")
        self.table = table
        self.seed = seed
        self.notes: list[str] = []
        self._utterances = utterances

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
        draws = _Draws("targets", step, count, strata or Strata(), repeat=True)
        rows, pool = self._draw(choice, draws, [self.table.reference[anchors]], anchors.unsqueeze(1), anchors)
        drawn = _speakers(pool, rows).T.flatten()
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
        """Speakers that the output must not sound like: neither anchor nor target, nor near-duplicates of them.

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
        return self.negative_embeddings(anchors, targets, step, count, choice=choice, strata=strata).speakers

    def negative_embeddings(
        self,
        anchors: Tensor,
        targets: Tensor,
        step: int,
        count: int,
        *,
        choice: Choice = "random",
        strata: Strata | None = None,
    ) -> Negatives:
        """The same draw as `negatives`, with the embeddings that were drawn: of speakers, or of their utterances."""
        queries = [self.table.reference[targets], self.table.reference[anchors]]
        draws = _Draws("negatives", step, count, strata or Strata(), repeat=False)
        avoid = torch.stack([anchors, targets], dim=1)
        rows, pool = self._draw(choice, draws, queries, avoid, torch.cat([anchors, targets]))
        return Negatives(rows, _speakers(pool, rows), pool.vectors(rows.clamp(min=0)))

    @cached_property
    def stratified_pool(self) -> EmbeddingPool:
        """What stratified choices draw from."""
        return (self._utterances and self._utterances()) or self.table

    def _draw(
        self, choice: Choice, draws: _Draws, queries: list[Tensor], avoid: Tensor, batch: Tensor
    ) -> tuple[Tensor, EmbeddingPool]:
        """(M, count) rows of a pool, or -1: none of the speakers `avoid` (M, A), or near-duplicates of `queries`."""
        if choice not in CHOICES:
            raise UserError(f"unknown choice {choice!r}{nearest(str(choice), CHOICES)}")
        purpose, count, strata = draws.purpose, draws.count, draws.strata
        draw = generator(self.seed, draws.step, purpose if choice == "random" else f"{choice} {purpose}")
        pool: EmbeddingPool = self.stratified_pool if choice == "stratified" else self.table
        if choice == "in_batch":
            present = torch.unique(batch)
            vectors = self.table.reference[present]
            found = Candidates(present.unsqueeze(0), [of @ vectors.T for of in queries], [])
        else:
            found = pool.candidates(queries, avoid, draw)
        limit = strata.same_speaker_threshold if choice == "stratified" else NEAR_DUPLICATE
        legal = found.cosines[0] < limit
        for others in (*found.cosines[1:], *found.of_speakers):
            legal &= others < limit
        legal &= found.rows >= 0
        speakers = pool.speakers_of(found.rows.clamp(min=0))
        for avoided in avoid.unbind(1):
            legal &= speakers != avoided.unsqueeze(1)
        if not bool(legal.any(dim=1).all()):
            self._state(f"some speakers have no legal {choice} {purpose[:-1]}")
        if choice == "stratified":
            places = draw_strata(found.cosines[0], legal, count, strata, draw, self._state)
        elif choice == "in_batch":
            places = draw_distinct(legal, count, torch.rand(legal.shape, generator=draw), again=draws.repeat)
        else:
            places = self._uniform(legal, count, draw)
        rows = found.rows.expand(len(places), -1).gather(1, places.clamp(min=0))
        return torch.where(places < 0, -1, rows), pool

    def _uniform(self, legal: Tensor, count: int, draw: torch.Generator) -> Tensor:
        possible = legal.any(dim=1, keepdim=True)
        places = torch.multinomial(torch.where(possible, legal, True).float(), count, replacement=True, generator=draw)
        return torch.where(possible, places, -1)

    def _random_targets(self, anchors: Tensor, step: int, count: int) -> Tensor:
        """(count * B,): a speaker that is not the anchor, drawn again while it is a near-duplicate of it."""
        draw = generator(self.seed, step, "targets")
        reference, size = self.table.reference, len(self.table)
        source, rows = reference[anchors].repeat(count, 1), torch.empty(0, dtype=torch.long)
        again = torch.ones(count * len(anchors), dtype=torch.bool)
        for _ in range(_REDRAWS):
            shift = torch.randint(1, size, (count, len(anchors)), generator=draw)
            drawn = ((anchors + shift) % size).flatten()
            rows = torch.where(again, drawn, rows) if len(rows) else drawn
            again = (reference[rows] * source).sum(1) >= NEAR_DUPLICATE
            if not bool(again.any()):
                return rows
        self._state("near-duplicates of some speakers are their targets: there is hardly anybody else")
        return rows

    def _state(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            _log.warning("%s", note)


def _speakers(pool: EmbeddingPool, rows: Tensor) -> Tensor:
    """The speakers of rows of a pool; -1 for -1."""
    return torch.where(rows < 0, -1, pool.speakers_of(rows.clamp(min=0)))
