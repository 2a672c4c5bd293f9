"""Which audio of a speaker conditions, which scores, and which is converted: parts that do not overlap."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from math import floor

from snac_core.errors import UserError
from snac_runner.data.corpus import Corpus, Segment, Utterance

PARTS = 4  # of a speaker's scoring audio that count as positives, each by itself
SHORTEST = 2.5  # s of a part that is cut from an utterance


def same_words(text: str) -> str:
    """A text without case, punctuation and spacing: equal for utterances that say the same."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@dataclass(frozen=True)
class Roles:
    """The parts of one speaker's speech. `scoring` overlaps neither of the others; see References."""

    conditioning: tuple[Segment, ...]
    scoring: tuple[Segment, ...]
    source: tuple[Segment, ...]


class References:
    """Each speaker's utterances, dealt out to roles that must not mix.

    - *conditioning*: what the speaker's embedding is made of.
    - *scoring*: what the mean embedding is made of that outputs are compared with.
    - *source*: what is converted into other voices, and resynthesised as the ceiling when the speaker is the target.

    A score is a distance to the scoring parts, so they overlap neither of the others: not the conditioning (the
    target's embedding would be part of the answer), not the source (with the own embedding, and in the ceiling, the
    item would be compared with itself).

    | utterances | conditioning | scoring | source |
    |---|---|---|---|
    | 1 | its first half | its second half | its first half |
    | 2 | the first | the second | the first |
    | n > 2 | half of what source leaves | the rest | n / 2, rounded down |

    With one or two utterances the source lies within its own speaker's conditioning. Conversion is not touched by that
    (a pair's target is another speaker); the own embedding is then made of the very item, and a note says so.
    The order is by a hash of the text where there is one, else of the id: where all speakers say the same sentences, a
    sentence has the same role for all of them, and the target's true version of a source conditions nothing.

    Args:
        corpus: the speech.
        split: "train", "dev" or "test".
        conditioning_seconds: most audio to condition on, in s (at least one utterance, or its beginning).
        scoring_seconds: most audio to score with, in s (likewise).

    Attributes:
        speakers: the split's speakers, sorted.
        notes: what a reader of the scores should know, one sentence each.
    """

    def __init__(
        self, corpus: Corpus, split: str, *, conditioning_seconds: float = 30.0, scoring_seconds: float = 60.0
    ) -> None:
        if conditioning_seconds <= 0 or scoring_seconds <= 0:
            raise UserError(
                f"conditioning_seconds {conditioning_seconds} and scoring_seconds {scoring_seconds} must be above 0"
            )
        corpus.split(split)
        self.speakers = corpus.speakers(split)
        self.split = split
        utterances = {speaker: corpus.of_speaker(speaker) for speaker in self.speakers}
        self._roles = {speaker: _deal(us, conditioning_seconds, scoring_seconds) for speaker, us in utterances.items()}
        self.notes = _notes(utterances, split)

    def _of(self, speaker: str) -> Roles:
        if speaker not in self._roles:
            raise UserError(f"speaker {speaker!r} is not in the {self.split} split")
        return self._roles[speaker]

    def conditioning(self, speaker: str) -> list[Segment]:
        """What the speaker's embedding is made of."""
        return list(self._of(speaker).conditioning)

    def scoring(self, speaker: str) -> list[Segment]:
        """What outputs in the speaker's voice are compared with."""
        return list(self._of(speaker).scoring)

    def parts(self, speaker: str) -> list[Segment]:
        """`PARTS` single parts of what outputs are compared with: whole utterances, or pieces where there are few."""
        scoring = self.scoring(speaker)
        pieces = -(-PARTS // len(scoring))
        cut = [piece for segment in scoring for piece in _pieces(segment, pieces)]
        return [cut[i % len(cut)] for i in range(PARTS)]

    def source(self, speaker: str) -> list[Segment]:
        """What of the speaker is converted into other voices."""
        return list(self._of(speaker).source)

    def ceiling(self, speaker: str, seconds: float | None = None) -> Segment:
        """Another real part of the speaker's speech, which does not overlap the scoring parts.

        Args:
            speaker: the target.
            seconds: the longest it may be, in s; None: as long as it is.
        """
        part = max(self._of(speaker).source, key=lambda s: s.seconds)
        return part if seconds is None else part._replace(seconds=min(part.seconds, seconds))


def _deal(utterances: tuple[Utterance, ...], conditioning_seconds: float, scoring_seconds: float) -> Roles:
    """Roles of one speaker's utterances."""
    order = sorted(utterances, key=_place)
    if len(order) == 1:
        only = order[0]
        half = _whole_ms(only.seconds / 2)
        first = (Segment(only.id, 0.0, half),)
        second = (Segment(only.id, half, _whole_ms(only.seconds - half)),)
        return Roles(_capped(first, conditioning_seconds), _capped(second, scoring_seconds), first)
    whole = tuple(whole_of(u) for u in order)
    if len(order) == 2:
        return Roles(_capped(whole[:1], conditioning_seconds), _capped(whole[1:], scoring_seconds), whole[:1])
    sources = len(order) // 2
    scores = sources + max(1, (len(order) - sources) // 2)
    return Roles(
        conditioning=_capped(whole[sources:scores], conditioning_seconds),
        scoring=_capped(whole[scores:], scoring_seconds),
        source=whole[:sources],
    )


def _place(utterance: Utterance) -> tuple[str, str]:
    """Where an utterance comes in its speaker's order: by its words, so that a sentence has one role in all voices."""
    words = same_words(utterance.text) if utterance.text else utterance.id
    return hashlib.sha256(words.encode()).hexdigest(), utterance.id


def whole_of(utterance: Utterance) -> Segment:
    """All of an utterance."""
    return Segment(utterance.id, 0.0, _whole_ms(utterance.seconds))


def _pieces(segment: Segment, count: int) -> list[Segment]:
    """At most `count` equal pieces of a segment, none below `SHORTEST`."""
    count = max(1, min(count, int(segment.seconds / SHORTEST)))
    length = _whole_ms(segment.seconds / count)
    return [Segment(segment.utterance, _whole_ms(segment.start + i * length), length) for i in range(count)]


def _whole_ms(seconds: float) -> float:
    """Rounded down to a thousandth of a second: written the same everywhere, and never past the end."""
    return floor(seconds * 1000 + 1e-6) / 1000


def _capped(parts: tuple[Segment, ...], seconds: float) -> tuple[Segment, ...]:
    """The first of `parts` up to a total length; at least one, cut if it is longer than that by itself."""
    kept: list[Segment] = []
    total = 0.0
    for part in parts:
        if kept and total + part.seconds > seconds:
            break
        kept.append(part._replace(seconds=min(part.seconds, seconds)))
        total += part.seconds
    return tuple(kept)


def _notes(utterances: dict[str, tuple[Utterance, ...]], split: str) -> tuple[str, ...]:
    one = sum(1 for us in utterances.values() if len(us) == 1)
    two = sum(1 for us in utterances.values() if len(us) == 2)
    notes = []
    if one:
        notes.append(
            f"{split}: {one} of {len(utterances)} speakers have one utterance; conditioning and scoring are its two "
            "halves, which share recording and session, so similarity is higher than across sessions"
        )
    if one + two:
        notes.append(
            f"{split}: for {one + two} of {len(utterances)} speakers the converted source is also what their own "
            "embedding is made of; this touches scores with the own embedding, not conversions"
        )
    return tuple(notes)
