"""What pocketsphinx reads in speech whose text is not known: words with their times, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from runner.data.audio import load_audio
from runner.data.corpus import Utterance
from runner.pretrain.words import RATE, Recogniser
from snac_core import atomic


class Word(NamedTuple):
    """A word, or silence (text ""), from `start` to `end`, in s."""

    text: str
    start: float
    end: float


Reading = list[Word]


def read_all(
    utterances: Sequence[Utterance], path: Path, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Reading]:
    """Utterance id -> what is read in it; readings that `path` (JSON lines) holds are not made again."""
    readings: dict[str, Reading] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            readings[entry["id"]] = [Word(*word) for word in entry["words"]]
    recognise = Recogniser()
    for number, u in enumerate(utterances):
        if u.id in readings:
            continue
        readings[u.id] = [Word(*word) for word in recognise.timed(load_audio(u, RATE), RATE)]
        lines = [json.dumps({"id": key, "words": words}) for key, words in readings.items()]
        atomic.write_text(path, "\n".join(lines) + "\n")
        if progress:
            progress(number + 1, len(utterances))
    return readings
