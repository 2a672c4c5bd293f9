"""How much of what was said is heard otherwise: by words, characters or phones."""

from __future__ import annotations

import re
from collections.abc import Sequence


def error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Insertions, deletions and substitutions per unit said; 1 at most, which is what silence gets.

    Raises:
        ValueError: if nothing was said.
    """
    if not said:
        raise ValueError("an error rate needs at least one unit to be said")
    return min(1.0, distance(said, heard) / len(said))


def distance(said: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that make `heard` of `said` (Levenshtein)."""
    before = list(range(len(heard) + 1))
    for number, unit in enumerate(said, 1):
        now = [number]
        for place, other in enumerate(heard, 1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (unit != other)))
        before = now
    return before[-1]


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and digits."""
    return re.findall(r"[a-z']+", text.lower())
