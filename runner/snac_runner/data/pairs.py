"""The conversions that all arms are evaluated on: chosen by (corpus, split, n, seed, seconds), hashed, exported."""

from __future__ import annotations

import os
import random
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from snac_core.errors import UserError
from snac_core.files import parse_json, write_json
from snac_core.seeding import derive, generator
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus, Segment, Utterance, digest_of
from snac_runner.data.crops import draw_start
from snac_runner.data.references import References, normalize_text


@dataclass(frozen=True)
class Pair:
    """One conversion.

    Attributes:
        id: unique, and valid as a file name: "0007-1688-to-367".
        source: the segment to convert.
        source_speaker: its speaker.
        target: the target speaker; never the source speaker.
        same_sex: None if either sex is not known.
        text: the transcript of the source, if known.
        parallel: an utterance of the target with the same words, used neither for conditioning nor for scoring; None if
            there is none.
    """

    id: str
    source: Segment
    source_speaker: str
    target: str
    same_sex: bool | None = None
    text: str | None = None
    parallel: Segment | None = None


@dataclass(frozen=True)
class PairList:
    """The conversions of a study, the same for all systems that are compared.

    Attributes:
        split: the split of the speakers.
        seed: of the choice.
        seconds: maximum length of a source, in s.
        pairs: the conversions.
        references: speaker (target or source) -> role ("conditioning", "scoring", "ceiling") -> segments.
        audio: utterance id -> sha256 of the file, and the start in it if it is not 0, for each utterance in pairs and
            references.
        files: utterance id -> (path below the corpus, start in s), for use with external systems.
    """

    split: str
    seed: int
    seconds: float
    pairs: tuple[Pair, ...]
    references: dict[str, dict[str, list[Segment]]]
    audio: dict[str, str]
    files: dict[str, tuple[str, float]]

    def __len__(self) -> int:
        return len(self.pairs)

    @classmethod
    def none(cls, split: str, *, seed: int, seconds: float) -> PairList:
        """The list without conversions, of a study that does not evaluate."""
        return cls(split, seed, seconds, (), {}, {}, {})

    @classmethod
    def of(
        cls, corpus: Corpus, references: References, pairs: tuple[Pair, ...], *, seed: int, seconds: float
    ) -> PairList:
        """The list of these pairs, with the references of their speakers and the digests of their audio."""
        speakers = sorted({p.target for p in pairs} | {p.source_speaker for p in pairs})
        roles = {
            speaker: {
                "conditioning": references.conditioning(speaker),
                "scoring": references.scoring(speaker),
                "ceiling": [references.ceiling(speaker, seconds)],
            }
            for speaker in speakers
        }
        ids = {p.source.utterance for p in pairs} | {p.parallel.utterance for p in pairs if p.parallel}
        ids |= {s.utterance for role in roles.values() for segments in role.values() for s in segments}
        utterances = [corpus.utterance(id) for id in sorted(ids)]
        return cls(
            split=references.split,
            seed=seed,
            seconds=seconds,
            pairs=pairs,
            references=roles,
            audio={u.id: _identity(u) for u in utterances},
            files={u.id: (Path(os.path.relpath(u.path, corpus.root)).as_posix(), u.start) for u in utterances},
        )

    def _content(self) -> dict[str, Any]:
        """Everything that affects results, i.e. all fields except `files`."""
        return {
            "split": self.split,
            "seed": self.seed,
            "seconds": self.seconds,
            "pairs": [asdict(pair) for pair in self.pairs],
            "references": self.references,
            "audio": self.audio,
        }

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON of pairs, references and audio digests."""
        return digest_of(self._content())

    def export(self, path: str | Path) -> None:
        """Write the list as JSON. Segments are [utterance id, start in s, length in s]."""
        files = {id: {"path": place, "start": start} for id, (place, start) in self.files.items()}
        write_json(path, {"digest": self.digest, **self._content(), "files": files})

    @classmethod
    def load(cls, path: str | Path) -> PairList:
        """Read what `export` wrote.

        Raises:
            UserError: if the file is not a list of pairs, or was changed after it was exported.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no list of pairs {path}; a study exports its own as pairs.json")
        try:
            stored = parse_json(path.read_text(encoding="utf-8"))
            pairs = cls(
                split=stored["split"],
                seed=stored["seed"],
                seconds=stored["seconds"],
                pairs=tuple(_pair(row) for row in stored["pairs"]),
                references={
                    speaker: {role: [Segment(*s) for s in segments] for role, segments in roles.items()}
                    for speaker, roles in stored["references"].items()
                },
                audio=dict(stored["audio"]),
                files={id: (place["path"], place["start"]) for id, place in stored["files"].items()},
            )
            digest = stored["digest"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a list of pairs as a study exports it ({error})") from None
        if digest != pairs.digest:
            raise UserError(f"{path} was changed after it was exported: digest {pairs.digest[:12]}, not {digest[:12]}")
        return pairs

    def check(self, corpus: Corpus) -> None:
        """Check that a corpus contains the audio that the list was made from.

        Raises:
            UserError: naming the first utterance that is missing or different.
        """
        for id, digest in self.audio.items():
            if _identity(corpus.utterance(id)) != digest:
                raise UserError(f"utterance {id!r} in {corpus.root} is not the audio that the list of pairs names")


def _identity(utterance: Utterance) -> str:
    """Identifies the audio of an utterance, from its start on."""
    start = round(utterance.start, 4)
    return f"{utterance.digest}@{start}" if start else utterance.digest


def _pair(row: dict[str, Any]) -> Pair:
    parallel = Segment(*row["parallel"]) if row["parallel"] else None
    return Pair(**{**row, "source": Segment(*row["source"]), "parallel": parallel})


_MIN_WHOLE_SECONDS = 1.5  # a shorter whole utterance is not preferred as a source, even if its text is known
_ARRANGEMENTS = 64  # random arrangements, of which the best balanced in same-sex and cross-sex pairs is taken


def conversion_pairs(
    corpus: Corpus,
    split: str,
    *,
    n: int,
    seed: int,
    seconds: float = 4.0,
    references: References | None = None,
    at_most: bool = False,
) -> PairList:
    """Choose `n` conversions between speakers of a split.

    All speakers are sources equally often to within one, and likewise targets. No (source speaker, target) combination
    is repeated before all others were used. If all sexes are known, same-sex and cross-sex pairs are about equally
    frequent. A source is a segment of at most `seconds` of the speaker's source segments (see References): a whole
    utterance with a known text if there is one, else a random crop that is not a pause.

    Args:
        corpus: the speech.
        split: "dev" or "test" (or "train", to measure memorization).
        n: how many pairs.
        seed: of the choice.
        seconds: maximum length of a source, in s.
        references: the roles of the speakers' utterances; None: References(corpus, split).
        at_most: whether fewer conversions are chosen where there are fewer than `n` different ones.

    Raises:
        UserError: if the split has fewer than two speakers, or fewer than `n` different conversions.
    """
    if n < 1 or seconds <= 0:
        raise UserError(f"{n} pairs of {seconds} s: both numbers must be above 0")
    references = references or References(corpus, split)
    speakers = references.speakers
    if len(speakers) < 2:
        raise UserError(f"the {split} split of {corpus.root} has one speaker, {speakers[0]!r}; conversion needs two")
    sexes = {speaker: corpus.sex(speaker) for speaker in speakers}
    sources = _SourceChooser(corpus, references, seconds, seed)
    pairs: list[Pair] = []
    for source, target in _balanced(speakers, sexes, n, seed):
        segment = sources.next(source, target)
        if segment is None and at_most:
            continue
        if segment is None:
            raise UserError(
                f"the {split} split of {corpus.root} has only {len(pairs)} different conversions of up to {seconds} s; "
                f"{n} were asked for"
            )
        utterance = corpus.utterance(segment.utterance)
        text = utterance.text if sources.is_whole(segment) else None
        known = sexes[source] is not None and sexes[target] is not None
        pairs.append(
            Pair(
                id=re.sub(r"[^\w.-]", "_", f"{len(pairs):04d}-{source}-to-{target}"),
                source=segment,
                source_speaker=source,
                target=target,
                same_sex=sexes[source] == sexes[target] if known else None,
                text=text,
                parallel=_parallel(corpus, references, target, text) if text else None,
            )
        )
    return PairList.of(corpus, references, tuple(pairs), seed=seed, seconds=seconds)


def _balanced(speakers: list[str], sexes: dict[str, str | None], n: int, seed: int) -> list[tuple[str, str]]:
    """`n` (source, target) combinations, source != target: the arrangement with the best balance of sexes."""
    if None in sexes.values():
        return _arrangement(speakers, n, random.Random(derive(seed, "pairs", 0)))
    trials = [_arrangement(speakers, n, random.Random(derive(seed, "pairs", trial))) for trial in range(_ARRANGEMENTS)]
    return min(trials, key=lambda pairs: abs(2 * sum(sexes[s] == sexes[t] for s, t in pairs) - len(pairs)))


def _arrangement(speakers: list[str], n: int, draw: random.Random) -> list[tuple[str, str]]:
    """`n` (source, target) combinations in rounds, in each of which every speaker is source once and target once.

    The speakers are put in a circle in random order. In a round, each speaker is converted to the one `step` places
    further. The steps 1 .. S-1 come in random order, which gives S (S-1) different combinations before they repeat. The
    last round may be incomplete.
    """
    circle = draw.sample(speakers, len(speakers))
    steps = draw.sample(range(1, len(circle)), len(circle) - 1)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < n:
        step = steps[len(chosen) // len(circle) % len(steps)]
        round_ = [(s, circle[(i + step) % len(circle)]) for i, s in enumerate(circle)]
        chosen += draw.sample(round_, len(round_))
    return chosen[:n]


class _SourceChooser:
    """Chooses source segments: those of a speaker in turn, and never the same segment twice for the same target."""

    def __init__(self, corpus: Corpus, references: References, seconds: float, seed: int) -> None:
        self.corpus = corpus
        self.seconds = seconds
        self.seed = seed
        self.used: set[tuple[Segment, str]] = set()
        self.turns = dict.fromkeys(references.speakers, 0)
        self.parts: dict[str, list[Segment]] = {}
        for speaker in references.speakers:
            parts = references.source(speaker)
            with_text = [
                p for p in parts if _MIN_WHOLE_SECONDS <= p.seconds <= seconds and self.is_whole(p) and self._text(p)
            ]
            chosen = with_text or parts
            first = derive(seed, "first source", speaker) % len(chosen)
            self.parts[speaker] = chosen[first:] + chosen[:first]

    def _text(self, part: Segment) -> str | None:
        return self.corpus.utterance(part.utterance).text

    def is_whole(self, part: Segment) -> bool:
        """Whether the segment is a whole utterance, so that the utterance's text is also the segment's."""
        return part.start == 0 and part.seconds > self.corpus.utterance(part.utterance).seconds - 0.002

    def next(self, speaker: str, target: str) -> Segment | None:
        """The speaker's next source for this target; None if there is no unused one."""
        parts = self.parts[speaker]
        for _ in range(2 * len(parts) + 8):
            turn = self.turns[speaker]
            self.turns[speaker] = turn + 1
            segment = self._cut(parts[turn % len(parts)], speaker, turn)
            if (segment, target) not in self.used:
                self.used.add((segment, target))
                return segment
        return None

    def _cut(self, part: Segment, speaker: str, turn: int) -> Segment:
        """A crop of at most `seconds` of a segment; its start is rounded down to 1 ms."""
        if part.seconds <= self.seconds:
            return part
        rate = self.corpus.utterance(part.utterance).sample_rate
        audio = load_audio(self.corpus.utterance(part.utterance), rate, start=part.start, seconds=part.seconds)
        draw: torch.Generator = generator(self.seed, "source", speaker, turn)
        start = draw_start(audio, round(self.seconds * rate), draw) / rate
        return Segment(part.utterance, part.start + int(start * 1000) / 1000, self.seconds)


def _parallel(corpus: Corpus, references: References, target: str, text: str) -> Segment | None:
    """An utterance of the target with the same words that is used neither for conditioning nor for scoring."""
    words = normalize_text(text)
    used = {s.utterance for s in (*references.conditioning(target), *references.scoring(target))}
    for u in corpus.of_speaker(target):
        if u.text and u.id not in used and normalize_text(u.text) == words:
            return Segment(u.id, 0.0, int(u.seconds * 1000) / 1000)
    return None
