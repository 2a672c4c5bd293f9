"""The roles of a speaker's utterances: conditioning, scoring, or source of conversions, without overlap."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from math import floor

import numpy as np
from numpy.typing import NDArray

from snac_core.errors import UserError
from snac_runner.data.corpus import Corpus, Segment, Utterance

POSITIVES = 4  # segments of a speaker's scoring audio that contrastive losses use as positives
_KEPT = 1024  # speakers whose roles are kept in memory
_MIN_PIECE_SECONDS = 2.5  # of a piece that is cut from an utterance


def normalize_text(text: str) -> str:
    """A text in lower case, without punctuation and repeated spaces: equal for utterances of the same words."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@dataclass(frozen=True)
class _SpeakerSegments:
    """The segments of one speaker by role. `scoring` overlaps neither of the others; see References."""

    conditioning: tuple[Segment, ...]
    scoring: tuple[Segment, ...]
    source: tuple[Segment, ...]


class References:
    """The utterances of each speaker, assigned to roles.

    - *conditioning*: the conditioning embedding of the speaker is computed from it.
    - *scoring*: the reference embedding that outputs are compared with is computed from it.
    - *source*: is converted to other voices, and resynthesized for the ceiling when the speaker is the target.

    Scoring segments overlap neither of the other roles. Otherwise a score would compare an output with the audio that
    conditioned it or, for the speaker's own embedding and the ceiling, with itself.

    | utterances | conditioning | scoring | source |
    |---|---|---|---|
    | 1 | its first half | its second half | its first half |
    | 2 | the first | the second | the first |
    | n > 2 | half of what source leaves | the rest | n / 2, rounded down |

    With one or two utterances, the source is also conditioning audio of its own speaker. This does not affect
    conversions (the target of a pair is another speaker), only scores with the speaker's own embedding; a note says so.
    The order is by a hash of the text if it is known, else of the id. In a parallel corpus, a sentence therefore has
    the same role for all speakers, and the target's recording of a source is not conditioning audio.

    Args:
        corpus: the speech.
        split: "train", "dev" or "test".
        conditioning_seconds: maximum conditioning audio per speaker, in s (at least one utterance, or its beginning).
        scoring_seconds: maximum scoring audio per speaker, in s (likewise).

    Attributes:
        speakers: the split's speakers, sorted.
        notes: facts that matter for reading the scores, one sentence each.

    Raises:
        UserError: if the split does not exist or is empty, or a length is not positive.
    """

    def __init__(
        self, corpus: Corpus, split: str, *, conditioning_seconds: float = 30.0, scoring_seconds: float = 60.0
    ) -> None:
        if conditioning_seconds <= 0 or scoring_seconds <= 0:
            raise UserError(
                f"conditioning_seconds {conditioning_seconds} and scoring_seconds {scoring_seconds} must be above 0"
            )
        part = corpus.split(split)
        self.speakers = corpus.speakers(split)
        self.split = split
        self.notes = _notes(part.counts, split)

        @lru_cache(maxsize=_KEPT)  # the roles of all speakers of a large corpus would be an object per utterance
        def assigned(speaker: str) -> _SpeakerSegments:
            if not len(part.rows_of(speaker)):
                raise UserError(f"speaker {speaker!r} is not in the {split} split")
            return _assign_roles(corpus.of_speaker(speaker), conditioning_seconds, scoring_seconds)

        self._of = assigned

    def conditioning(self, speaker: str) -> list[Segment]:
        """The segments that the speaker's conditioning embedding is computed from."""
        return list(self._of(speaker).conditioning)

    def scoring(self, speaker: str) -> list[Segment]:
        """The segments that outputs in the speaker's voice are compared with."""
        return list(self._of(speaker).scoring)

    def positives(self, speaker: str) -> list[Segment]:
        """`POSITIVES` segments of the scoring audio: whole utterances, or pieces if there are few utterances."""
        scoring = self.scoring(speaker)
        count = -(-POSITIVES // len(scoring))
        pieces = [piece for segment in scoring for piece in _pieces(segment, count)]
        return [pieces[i % len(pieces)] for i in range(POSITIVES)]

    def source(self, speaker: str) -> list[Segment]:
        """The segments of the speaker that are converted to other voices."""
        return list(self._of(speaker).source)

    def ceiling(self, speaker: str, seconds: float | None = None) -> Segment:
        """The speaker's longest source segment, which does not overlap the scoring segments.

        Args:
            speaker: the target.
            seconds: maximum length, in s; None: no maximum.
        """
        part = max(self._of(speaker).source, key=lambda s: s.seconds)
        return part if seconds is None else part._replace(seconds=min(part.seconds, seconds))


def _assign_roles(
    utterances: tuple[Utterance, ...], conditioning_seconds: float, scoring_seconds: float
) -> _SpeakerSegments:
    """The roles of one speaker's utterances."""
    order = sorted(utterances, key=_hash_order)
    if len(order) == 1:
        only = order[0]
        half = _floor_ms(only.seconds / 2)
        first: tuple[Segment, ...] = (Segment(only.id, 0.0, half),)
        second: tuple[Segment, ...] = (Segment(only.id, half, _floor_ms(only.seconds - half)),)
        return _SpeakerSegments(_capped(first, conditioning_seconds), _capped(second, scoring_seconds), first)
    whole = tuple(whole_segment(u) for u in order)
    if len(order) == 2:
        first, second = whole[:1], whole[1:]
        return _SpeakerSegments(_capped(first, conditioning_seconds), _capped(second, scoring_seconds), first)
    conditioning = len(order) // 2  # index of the first conditioning utterance
    scoring = conditioning + max(1, (len(order) - conditioning) // 2)  # index of the first scoring utterance
    return _SpeakerSegments(
        conditioning=_capped(whole[conditioning:scoring], conditioning_seconds),
        scoring=_capped(whole[scoring:], scoring_seconds),
        source=whole[:conditioning],
    )


def _hash_order(utterance: Utterance) -> tuple[str, str]:
    """Sorts utterances by a hash of their words, so that a sentence has the same role for all speakers."""
    words = normalize_text(utterance.text) if utterance.text else utterance.id
    return hashlib.sha256(words.encode()).hexdigest(), utterance.id


def whole_segment(utterance: Utterance) -> Segment:
    """The segment that is a whole utterance."""
    return Segment(utterance.id, 0.0, whole_seconds(utterance.seconds))


def whole_seconds(seconds: float) -> float:
    """The length of the segment that is a whole utterance of `seconds`."""
    return _floor_ms(seconds)


def _pieces(segment: Segment, count: int) -> list[Segment]:
    """At most `count` equal pieces of a segment, each of at least `_MIN_PIECE_SECONDS` unless there is only one."""
    count = max(1, min(count, int(segment.seconds / _MIN_PIECE_SECONDS)))
    length = _floor_ms(segment.seconds / count)
    return [Segment(segment.utterance, _floor_ms(segment.start + i * length), length) for i in range(count)]


def _floor_ms(seconds: float) -> float:
    """Rounded down to 1 ms: exact in JSON, and never past the end of the audio."""
    return floor(seconds * 1000 + 1e-6) / 1000


def _capped(parts: tuple[Segment, ...], seconds: float) -> tuple[Segment, ...]:
    """The first segments up to a total length (in s); at least one, which is cut if it alone is longer."""
    kept: list[Segment] = []
    total = 0.0
    for part in parts:
        if kept and total + part.seconds > seconds:
            break
        kept.append(part._replace(seconds=min(part.seconds, seconds)))
        total += part.seconds
    return tuple(kept)


def _notes(counts: NDArray[np.int64], split: str) -> tuple[str, ...]:
    one, two = int((counts == 1).sum()), int((counts == 2).sum())
    notes = []
    if one:
        notes.append(
            f"{split}: {one} of {len(counts)} speakers have one utterance; conditioning and scoring are its two "
            "halves, which share recording and session, so similarity is higher than across sessions"
        )
    if one + two:
        notes.append(
            f"{split}: for {one + two} of {len(counts)} speakers the converted source is also conditioning "
            "audio of their own embedding; this affects scores with their own embedding, not conversions"
        )
    return tuple(notes)
