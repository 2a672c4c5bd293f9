"""The same conversions side by side: wavs and small spectrograms, embedded in the page.

A blind listening test: X is the target's own voice; which of A and B, two arms in random order, is closer to it?

The page holds no arm's name. Who A and B are follows from the study alone, so that votes can be brought back to it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from snac_core.errors import UserError
from snac_core.files import write_text
from snac_runner.evaluate.statistics import Estimate
from snac_runner.report.results import Run, Study, finite

MOST_BYTES = 11_000_000  # of wav data in the page; base64 makes four bytes of three
MOST_PAIRS = 12
MOST_WORST = 10
WORST_BYTES = 5_000_000
OWN = ".identity"  # ends the name of a sample under the source's own embedding
IMAGE = (150, 56)  # spectrogram, in pixels


@dataclass(frozen=True)
class Clip:
    """One audio file of a pair; without `audio` it says why there is none."""

    label: str
    mark: int | None
    seconds: float
    audio: str = ""  # base64
    image: str = ""
    score: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Group:
    """A pair: its clips in one order, the controls first."""

    pair: str
    source_speaker: str
    target_speaker: str
    clips: tuple[Clip, ...]
    identity: tuple[Clip, ...] = ()  # the arms under the source's own embedding, where a run kept them


def groups(study: Study) -> tuple[list[Group], int]:
    """Pairs with samples, and how many more there are than the page takes.

    Each arm speaks with its first successful seed. Pairs that all columns have come first.
    """
    columns: list[tuple[str, int | None, Run]] = []
    names = {"source": "source", "ceiling": "target (ceiling)", "floor": "bare codec (floor)"}
    for control in [*names, *sorted(set(study.controls) - {*names, "mismatched"})]:
        run = study.controls.get(control)
        columns += [(names.get(control, control), None, run)] if run is not None and run.ok else []
    speaking = {arm: first for arm, runs in study.arms.items() if (first := next((r for r in runs if r.ok), None))}
    usual = min((r.seed for r in speaking.values() if r.seed is not None), default=None)
    for mark, arm in enumerate(study.arms):
        if arm in speaking:
            seed = speaking[arm].seed
            columns.append((arm if seed == usual else f"{arm} (seed {seed})", mark, speaking[arm]))
    files = [{p.stem: p for p in sorted((run.folder / "samples").glob("*.wav"))} for _, _, run in columns]
    own = [{k.removesuffix(OWN): f.pop(k) for k in list(f) if k.endswith(OWN)} for f in files]
    names_of = sorted({pair for f in files for pair in f}, key=lambda pair: (-sum(pair in f for f in files), pair))
    found: list[Group] = []
    spent = 0
    for pair in names_of[:MOST_PAIRS]:
        clips = tuple(
            _clip(label, mark, run, pair, f.get(pair)) for (label, mark, run), f in zip(columns, files, strict=True)
        )
        kept = [
            (*column, f[pair]) for column, f in zip(columns, own, strict=True) if pair in f and column[1] is not None
        ]
        identity = tuple(replace(_clip(label, mark, run, pair, path), score=None) for label, mark, run, path in kept)
        size = sum(len(c.audio) for c in clips + identity) * 3 // 4
        if found and spent + size > MOST_BYTES:
            break
        spent += size
        described = next((u for r in study.results() for u in r.utterances if u.pair == pair), None)
        speakers = (described.source_speaker, described.target_speaker) if described else ("", "")
        found.append(Group(pair, *speakers, clips, identity))
    return found, len(names_of) - len(found)


def worst(study: Study) -> list[Group]:
    """The conversions least like their target over all arms' first successful seeds, worst first."""
    scored: list[tuple[float, str, int, str, Run]] = []
    for mark, (arm, runs) in enumerate(study.arms.items()):
        run = next((r for r in runs if r.ok and r.result is not None), None)
        if run is None or run.result is None:
            continue
        kept = {p.name.removesuffix(".converted.wav") for p in (run.folder / "samples/worst").glob("*.converted.wav")}
        scored += [
            (score, arm, mark, item.pair, run)
            for item in run.result.utterances
            if item.pair in kept and (score := finite(item.metrics.get("secs"))) is not None
        ]
    found: list[Group] = []
    spent = 0
    for _, arm, mark, pair, run in sorted(scored, key=lambda s: (s[0], s[1], s[3]))[:MOST_WORST]:
        parts = {part: run.folder / "samples" / "worst" / f"{pair}.{part}.wav" for part in ("source", "target")}
        beside = [
            replace(_clip(part, None, run, pair, path if path.is_file() else None), score=None)
            for part, path in parts.items()
        ]
        clips = (*beside, _clip(arm, mark, run, pair, run.folder / "samples" / "worst" / f"{pair}.converted.wav"))
        spent += sum(len(c.audio) for c in clips) * 3 // 4
        if found and spent > WORST_BYTES:
            break
        item = next(u for u in run.result.utterances if u.pair == pair) if run.result else None
        speakers = (item.source_speaker, item.target_speaker) if item else ("", "")
        found.append(Group(f"{pair} by {arm}", *speakers, clips))
    return found


def _clip(label: str, mark: int | None, run: Run, pair: str, path: Path | None) -> Clip:
    if path is None:
        return Clip(label, mark, 0.0, problem="no sample")
    score = None
    if run.result is not None:
        item = next((u for u in run.result.utterances if u.pair == pair), None)
        score = finite(item.metrics.get("secs")) if item is not None else None
    return replace(clip_of(path), label=label, mark=mark, score=score)


def clip_of(path: Path) -> Clip:
    """A file's sound and spectrogram, or why there is none."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        return Clip("", None, 0.0, problem=f"cannot be read ({type(error).__name__})")
    mono = samples.mean(axis=1)
    if not mono.size:
        return Clip("", None, 0.0, problem="empty")
    if not np.isfinite(mono).all():
        return Clip("", None, mono.size / rate, problem="NaN in the audio")
    wav, png = encode_wav(mono, rate), spectrogram_png(mono, rate)
    return Clip("", None, mono.size / rate, _base64(wav), _base64(png))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def encode_wav(mono: NDArray[np.float32], rate: int) -> bytes:
    """16-bit PCM, clipped at full scale."""
    out = io.BytesIO()
    soundfile.write(out, np.clip(mono, -1, 1), rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def spectrogram_png(mono: NDArray[np.float32], rate: int) -> bytes:
    """A log-frequency spectrogram over 60 dB, as a PNG whose ink is alpha only: it suits light and dark pages."""
    width, height = IMAGE
    size = 512 if rate <= 24_000 else 1024
    padded = np.pad(mono.astype(np.float64), (size // 2, size))
    starts = np.linspace(0, max(0, len(mono) - 1), width).astype(int)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2  # (width, size / 2 + 1)
    edges = np.geomspace(80, rate / 2, height + 1) / rate * size
    bands = np.stack([power[:, int(lo) : max(int(hi), int(lo) + 1)].mean(axis=1) for lo, hi in pairwise(edges)])
    level = 10 * np.log10(bands + 1e-12)
    shade = np.clip((level - level.max() + 60) / 60, 0, 1)
    return alpha_png((shade[::-1] * 15).round().astype(np.uint8))


def alpha_png(shades: NDArray[np.uint8], colour: tuple[int, int, int] = (86, 110, 168)) -> bytes:
    """A palette PNG (H, W) of one colour in 16 steps of alpha (PNG specification, section 11.2)."""
    height, width = shades.shape
    nibbles = np.pad(shades, ((0, 0), (0, width % 2)))
    packed = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
    raw = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    alphas = bytes(round(i / 15 * 255) for i in range(16))
    body = [chunk(b"IHDR", header), chunk(b"PLTE", bytes(colour) * 16), chunk(b"tRNS", alphas)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*body, chunk(b"IDAT", zlib.compress(raw, 9)), chunk(b"IEND", b"")])


MOST_TRIALS = 40
ABX_MOST_BYTES = 11_000_000  # of wav data in the page
CHOICES = ("a", "b", "same")


@dataclass(frozen=True)
class Trial:
    """One question; `a` and `b` are names of arms or systems, `files` the audio of X, A and B."""

    id: str
    pair: str
    a: str
    b: str
    files: tuple[Path, Path, Path]


def trials(study: Study) -> list[Trial]:
    """Questions on every pair of arms and systems for every conversion that all of them have audio of, shuffled."""
    ceiling = study.controls.get("ceiling")
    if ceiling is None or not ceiling.ok:
        return []
    speaking: dict[str, Run] = {
        arm: first for arm, runs in study.arms.items() if (first := next((r for r in runs if r.ok), None))
    }
    speaking |= {n: r for n, r in study.controls.items() if r.ok and r.result is not None and r.result.kind == "system"}
    found = []
    for target in sorted((ceiling.folder / "samples").glob("*.wav")):
        for one, other in combinations(speaking, 2):
            drawn = hashlib.sha256("\0".join((target.stem, one, other)).encode()).hexdigest()
            a, b = (one, other) if int(drawn[0], 16) % 2 else (other, one)
            files = (target, *(speaking[name].folder / "samples" / target.name for name in (a, b)))
            if all(file.is_file() for file in files):
                found.append(Trial(drawn[:12], target.stem, a, b, (files[0], files[1], files[2])))
    return sorted(found, key=lambda trial: trial.id)[:MOST_TRIALS]


def digest(found: list[Trial]) -> str:
    """Of the questions: votes on other ones are refused."""
    return hashlib.sha256("".join(trial.id for trial in found).encode()).hexdigest()[:16]


def contents(found: list[Trial]) -> dict[str, Any]:
    """What the page needs: clips once each, and the questions as numbers of clips; nobody's name."""
    clips: dict[str, int] = {}
    asked: list[dict[str, Any]] = []
    spent = 0
    for trial in found:
        heard = [clip_of(file) for file in trial.files]
        if any(not clip.audio for clip in heard):
            continue
        fresh = {clip.audio for clip in heard} - clips.keys()
        spent += sum(len(audio) for audio in fresh) * 3 // 4
        if asked and spent > ABX_MOST_BYTES:
            break
        for clip in heard:
            clips.setdefault(clip.audio, len(clips))
        asked.append({"id": trial.id, "clips": [clips[clip.audio] for clip in heard]})
    return {"digest": digest(found), "clips": list(clips), "trials": asked}


def accept(study: Study, file: Path) -> Path:
    """Keep a file of votes with the study; where it was put.

    Raises:
        UserError: if it is no file of votes, or of another study's.
    """
    found = trials(study)
    votes = _read(file, found)
    text = json.dumps(votes, sort_keys=True)
    place = study.folder / "votes" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    write_text(place, text)
    return place


def _read(file: Path, found: list[Trial]) -> dict[str, Any]:
    try:
        votes = json.loads(file.read_text(encoding="utf-8"))
        given = [(vote["trial"], vote["choice"]) for vote in votes["votes"]]
        of, listener = votes["study"], str(votes.get("listener", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no file of votes as abx.html exports it ({type(error).__name__}: {error})"
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
    """Share of questions about an arm in which listeners found it closer to the target; "same" counts half.

    The interval is Wilson's (1927, J. Am. Stat. Assoc. 22, 209-212) over votes: it does not know who voted.
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
            continue  # votes on questions that the study no longer asks
        yield from ((vote["trial"], vote["choice"]) for vote in votes["votes"])


def _wilson(values: list[float]) -> Estimate:
    n, z = len(values), 1.959964
    share = sum(values) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, centre - half, centre + half, math.nan, math.nan, "Wilson", 0, 0, 0, n)
