"""A list of conversions as a file: what to convert to whom, from which audio, and a hash over all of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.data.corpus import Corpus, Segment, digest_of
from runner.data.references import References
from snac_core import atomic
from snac_core.errors import UserError


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
        atomic.write_json(path, {"digest": self.digest, **self._content(), "files": files})

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
