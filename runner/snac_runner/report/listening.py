"""The blind listening test (ABX): X is real speech of the target; which of A and B, two arms, is closer to it?

The page contains no names of arms. Which arms A and B are follows from the study alone, so that votes can be assigned
to them afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from snac_core.errors import UserError
from snac_core.files import parse_json, write_text
from snac_runner.evaluate.statistics import Estimate
from snac_runner.report.results import Run, Study
from snac_runner.report.samples import MAX_BYTES, clip_of

MAX_TRIALS = 40
CHOICES = ("a", "b", "same")


@dataclass(frozen=True)
class Trial:
    """One question: `a` and `b` are names of arms or systems, `files` the audio of X, A and B."""

    id: str
    pair: str
    a: str
    b: str
    files: tuple[Path, Path, Path]


def trials(study: Study) -> list[Trial]:
    """The questions, in random order: every pair of arms and systems on every conversion of which both kept audio."""
    ceiling = study.controls.get("ceiling")
    if ceiling is None or not ceiling.ok:
        return []
    first_runs: dict[str, Run] = {
        arm: first for arm, runs in study.arms.items() if (first := next((r for r in runs if r.ok), None))
    }
    first_runs |= {name: run for name in study.systems() if (run := study.controls[name]).ok}
    found = []
    for target in sorted((ceiling.folder / "samples").glob("[!.]*.wav")):
        for one, other in combinations(first_runs, 2):
            drawn = hashlib.sha256("\0".join((target.stem, one, other)).encode()).hexdigest()
            a, b = (one, other) if int(drawn[0], 16) % 2 else (other, one)
            files = (target, *(first_runs[name].folder / "samples" / target.name for name in (a, b)))
            if all(file.is_file() for file in files):
                found.append(Trial(drawn[:12], target.stem, a, b, (files[0], files[1], files[2])))
    return sorted(found, key=lambda trial: trial.id)[:MAX_TRIALS]


def digest(found: list[Trial]) -> str:
    """Of the questions; votes on other questions are refused."""
    return hashlib.sha256("".join(trial.id for trial in found).encode()).hexdigest()[:16]


def contents(found: list[Trial]) -> dict[str, Any]:
    """The data of the page: every clip once, and the questions as indices of clips, without names."""
    clips: dict[str, int] = {}
    questions: list[dict[str, Any]] = []
    spent = 0
    for trial in found:
        played = [clip_of(file) for file in trial.files]
        if any(not clip.audio for clip in played):
            continue
        fresh = {clip.audio for clip in played} - clips.keys()
        spent += sum(len(audio) for audio in fresh) * 3 // 4
        if questions and spent > MAX_BYTES:
            break
        for clip in played:
            clips.setdefault(clip.audio, len(clips))
        questions.append({"id": trial.id, "clips": [clips[clip.audio] for clip in played]})
    return {"digest": digest(found), "clips": list(clips), "trials": questions}


def accept(study: Study, file: Path) -> Path:
    """Store a file of votes in the study's folder.

    Returns:
        where it is stored.

    Raises:
        UserError: if it is not a file of votes, or its votes are on another study.
    """
    found = trials(study)
    votes = _read(file, found)
    text = json.dumps(votes, sort_keys=True)
    place = study.folder / "votes" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    write_text(place, text)
    return place


def _read(file: Path, found: list[Trial]) -> dict[str, Any]:
    try:
        votes = parse_json(file.read_text(encoding="utf-8"))
        given = [(vote["trial"], vote["choice"]) for vote in votes["votes"]]
        of, listener = votes["study"], str(votes.get("listener", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not a file of votes as abx.html exports it ({type(error).__name__}: {error})"
        ) from None
    if of != digest(found):
        raise UserError(f"{file} holds votes on another study's questions ({of}; this study's are {digest(found)})")
    known = {trial.id for trial in found}
    for trial, choice in given:
        if trial not in known or choice not in CHOICES:
            raise UserError(f"{file}: vote {choice!r} on {trial!r}; expected a, b or same, on a trial of this study")
    unique = dict(given)
    return {
        "study": of, "listener": listener, "votes": [{"trial": t, "choice": unique[t]} for t in sorted(unique)]
    }  # fmt: skip


def preferences(study: Study) -> dict[str, Estimate]:
    """Arm to the share of its questions in which listeners found it closer to the target; "same" counts as half.

    The interval is Wilson's (1927, J. Am. Stat. Assoc. 22, 209-212) over votes; it ignores who voted.
    """
    found = trials(study)
    by_id = {trial.id: trial for trial in found}
    score: dict[str, list[float]] = {}
    for trial, choice in _votes(study, found):
        for name, mine in ((by_id[trial].a, "a"), (by_id[trial].b, "b")):
            score.setdefault(name, []).append(0.5 if choice == "same" else float(choice == mine))
    return {name: _wilson(values) for name, values in score.items()}


def _votes(study: Study, found: list[Trial]) -> Iterator[tuple[str, str]]:
    for file in sorted((study.folder / "votes").glob("*.json")):
        try:
            votes = _read(file, found)
        except UserError:
            continue  # votes on other questions
        yield from ((vote["trial"], vote["choice"]) for vote in votes["votes"])


def _wilson(values: list[float]) -> Estimate:
    n, z = len(values), 1.959964
    share = sum(values) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, centre - half, centre + half, math.nan, math.nan, "Wilson", 0, 0, 0, n)
