"""A list of conversions as a file: what to convert to whom, from which audio, and a hash over all of it.

The conversions that every arm is judged on: fixed by (corpus, split, n, seed, seconds), hashed, exported."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch

from snac_core.errors import UserError
from snac_core.files import write_json
from snac_core.seeding import derive, generator
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus, Segment, digest_of
from snac_runner.data.crops import draw_start
from snac_runner.data.references import References, same_words


@dataclass(frozen=True)
class Pair:
    """One conversion.

    Attributes:
        id: its name, which can be a file name: "0007-1688-to-367".
        source: what is converted.
        source_speaker: who speaks there.
        target: whose voice is wanted; never the source's speaker.
        same_sex: None where a sex is not known.
        text: what the source says, where known.
        parallel: the target's own utterance of the same words, where there is one that neither conditions nor scores.
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
    """Conversions that are the same for everything that is compared.

    Attributes:
        split: the split that the speakers are of.
        seed: of the choice.
        seconds: the longest source, in s.
        pairs: the conversions.
        references: for each speaker who is a target or a source, "conditioning", "scoring" and "ceiling" segments.
        audio: utterance id -> sha256 of the file, for every utterance named above.
        files: utterance id -> (path below the corpus, start in s), for those who convert with another system.
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
    def of(
        cls, corpus: Corpus, references: References, pairs: tuple[Pair, ...], *, seed: int, seconds: float
    ) -> PairList:
        """The list of these pairs, with the references and the digests that belong to it."""
        speakers = sorted({p.target for p in pairs} | {p.source_speaker for p in pairs})
        roles = {
            speaker: {
                "conditioning": references.conditioning(speaker),
                "scoring": references.scoring(speaker),
                "ceiling": [references.ceiling(speaker, seconds)],
            }
            for speaker in speakers
        }
        named = {p.source.utterance for p in pairs} | {p.parallel.utterance for p in pairs if p.parallel}
        named |= {s.utterance for role in roles.values() for segments in role.values() for s in segments}
        utterances = [corpus.utterance(id) for id in sorted(named)]
        return cls(
            split=references.split,
            seed=seed,
            seconds=seconds,
            pairs=pairs,
            references=roles,
            audio={u.id: u.digest for u in utterances},
            files={u.id: (Path(os.path.relpath(u.path, corpus.root)).as_posix(), u.start) for u in utterances},
        )

    def _content(self) -> dict[str, Any]:
        """All that decides a result: everything but where the files lie."""
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
            UserError: if the file is not a list of pairs, or was changed after it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no list of pairs {path}; a study writes its own as pairs.json")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
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
            raise UserError(f"{path} is no list of pairs as a study exports it ({error})") from None
        if digest != pairs.digest:
            raise UserError(f"{path} was changed after it was exported: digest {pairs.digest[:12]}, not {digest[:12]}")
        return pairs

    def check(self, corpus: Corpus) -> None:
        """Check that a corpus holds the very audio that the list was made from.

        Raises:
            UserError: naming the first utterance that is missing or different.
        """
        for id, digest in self.audio.items():
            if corpus.utterance(id).digest != digest:
                raise UserError(f"utterance {id!r} in {corpus.root} is not the audio that the list of pairs names")


def _pair(row: dict[str, Any]) -> Pair:
    parallel = Segment(*row["parallel"]) if row["parallel"] else None
    return Pair(**{**row, "source": Segment(*row["source"]), "parallel": parallel})


_LEAST = 1.5  # s: a whole utterance below is too short a source to be preferred for its text
_ARRANGEMENTS = 64  # tried for the one that has same-sex and cross-sex pairs most nearly alike in number


def conversion_pairs(
    corpus: Corpus,
    split: str,
    *,
    n: int,
    seed: int,
    seconds: float = 4.0,
    references: References | None = None,
) -> PairList:
    """`n` conversions between speakers of a split.

    Every speaker is source, and target, equally often to within one; no combination of two speakers comes twice before
    all have come. Where sexes are known, same-sex and cross-sex pairs are about equal in number. A source is a part of
    at most `seconds` from its speaker's source parts (see References): a whole utterance with a known text where there
    are such, else a cut at random that is not a pause.

    Args:
        corpus: the speech.
        split: "dev" or "test" (or "train", to look at what was learned by heart).
        n: how many pairs.
        seed: of the choice.
        seconds: the longest source, in s.
        references: the roles of the speakers' audio; None: References(corpus, split).

    Raises:
        UserError: if the split has fewer than two speakers, or not as many different conversions.
    """
    if n < 1 or seconds <= 0:
        raise UserError(f"{n} pairs of {seconds} s: both numbers must be above 0")
    references = references or References(corpus, split)
    speakers = references.speakers
    if len(speakers) < 2:
        raise UserError(f"the {split} split of {corpus.root} has one speaker, {speakers[0]!r}; conversion needs two")
    sexes = {speaker: corpus.sex(speaker) for speaker in speakers}
    sources = _Sources(corpus, references, seconds, seed)
    pairs: list[Pair] = []
    for source, target in _balanced(speakers, sexes, n, seed):
        segment = sources.next(source, target)
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
    """`n` (source, target), source != target.

    The speakers stand in a circle; in a round, everybody is converted to the one `step` places further: each is source
    once and target once. Rounds take the steps 1 .. S-1 in random order: S (S-1) different combinations, then again.
    The last round may be a part of one.
    """

    def arranged(trial: int) -> list[tuple[str, str]]:
        draw = random.Random(derive(seed, "pairs", trial))
        circle = draw.sample(speakers, len(speakers))
        steps = draw.sample(range(1, len(circle)), len(circle) - 1)
        chosen: list[tuple[str, str]] = []
        for turn in count():
            step = steps[turn % len(steps)]
            round_ = [(s, circle[(i + step) % len(circle)]) for i, s in enumerate(circle)]
            chosen += draw.sample(round_, len(round_))
            if len(chosen) >= n:
                break
        return chosen[:n]

    if None in sexes.values():
        return arranged(0)
    tries = [arranged(trial) for trial in range(_ARRANGEMENTS)]
    return min(tries, key=lambda pairs: abs(2 * sum(sexes[s] == sexes[t] for s, t in pairs) - len(pairs)))


class _Sources:
    """Deals out source segments: each speaker's in turn, none twice to the same target."""

    def __init__(self, corpus: Corpus, references: References, seconds: float, seed: int) -> None:
        self.corpus = corpus
        self.seconds = seconds
        self.seed = seed
        self.used: set[tuple[Segment, str]] = set()
        self.turns = dict.fromkeys(references.speakers, 0)
        self.parts: dict[str, list[Segment]] = {}
        for speaker in references.speakers:
            parts = references.source(speaker)
            spoken = [p for p in parts if _LEAST <= p.seconds <= seconds and self.is_whole(p) and self._text(p)]
            chosen = spoken or parts
            first = derive(seed, "first source", speaker) % len(chosen)
            self.parts[speaker] = chosen[first:] + chosen[:first]

    def _text(self, part: Segment) -> str | None:
        return self.corpus.utterance(part.utterance).text

    def is_whole(self, part: Segment) -> bool:
        """Whether the part is all of its utterance, so that the utterance's text is the part's."""
        return part.start == 0 and part.seconds > self.corpus.utterance(part.utterance).seconds - 0.002

    def next(self, speaker: str, target: str) -> Segment | None:
        """The speaker's next source for this target; None if there is no other."""
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
        """At most `seconds` of a part, to a thousandth of a second."""
        if part.seconds <= self.seconds:
            return part
        rate = self.corpus.utterance(part.utterance).sample_rate
        audio = load_audio(self.corpus.utterance(part.utterance), rate, start=part.start, seconds=part.seconds)
        draw: torch.Generator = generator(self.seed, "source", speaker, turn)
        start = draw_start(audio, round(self.seconds * rate), draw) / rate
        return Segment(part.utterance, part.start + int(start * 1000) / 1000, self.seconds)


def _parallel(corpus: Corpus, references: References, target: str, text: str) -> Segment | None:
    """The target's own utterance of the same words, where it neither conditions nor scores."""
    words = same_words(text)
    taken = {s.utterance for s in (*references.conditioning(target), *references.scoring(target))}
    for u in corpus.of_speaker(target):
        if u.text and u.id not in taken and same_words(u.text) == words:
            return Segment(u.id, 0.0, int(u.seconds * 1000) / 1000)
    return None
