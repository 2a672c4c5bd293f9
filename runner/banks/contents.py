"""What a bank of a corpus holds: its utterances in order, and what each speaker's embeddings are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runner.data import Corpus, References, Segment, Utterance
from runner.data.corpus import SPLITS
from runner.data.references import whole_of
from runner.embeddings import key_of, segment_key


@dataclass(frozen=True)
class Wanted:
    """What a bank of a corpus holds.

    Attributes:
        utterances: by row: those of train, then dev, then test.
        keys: (N, 32) of them.
        speakers: by label, likewise.
        labels: (N,) the utterances' speakers.
        roles: the parts that condition, and the parts that score, by label.
        speaker_keys: (P, 32) of both.
        splits, speaker_splits: see `snac_core.speakers.bank.BankHeader`.
    """

    utterances: list[Utterance]
    keys: NDArray[np.uint8]
    speakers: list[str]
    labels: NDArray[np.int32]
    roles: list[tuple[list[Segment], list[Segment]]]
    speaker_keys: NDArray[np.uint8]
    splits: dict[str, tuple[int, int]]
    speaker_splits: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, corpus: Corpus) -> Wanted:
        """What the bank of this corpus holds."""
        utterances: list[Utterance] = []
        speakers: list[str] = []
        roles: list[tuple[list[Segment], list[Segment]]] = []
        splits, speaker_splits = {}, {}
        for split in SPLITS:
            here, voices = corpus.splits.get(split, ()), corpus.speakers(split)
            splits[split] = (len(utterances), len(utterances) + len(here))
            speaker_splits[split] = (len(speakers), len(speakers) + len(voices))
            utterances += here
            speakers += voices
            if voices:
                references = References(corpus, split)
                roles += [(references.conditioning(speaker), references.scoring(speaker)) for speaker in voices]
        number = {speaker: label for label, speaker in enumerate(speakers)}
        return cls(
            utterances,
            np.stack([segment_key(u, whole_of(u)) for u in utterances]),
            speakers,
            np.array([number[u.speaker] for u in utterances], dtype=np.int32),
            roles,
            np.stack([key_of([[_heard(corpus, s) for s in role] for role in both]) for both in roles]),
            splits,
            speaker_splits,
        )


def _heard(corpus: Corpus, segment: Segment) -> str:
    return segment_key(corpus.utterance(segment.utterance), segment).tobytes().hex()
