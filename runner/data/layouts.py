"""Where the audio files are and whose they are, for each layout of folders that speech corpora come in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.data.corpus import SPLITS
from runner.data.labels import sexes_beside, texts_beside
from snac_core.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
EXPECTED = (
    "expected <root>/<speaker>/**/*.wav (or flac, ogg, mp3, opus), the same below train/, dev/ and test/, "
    "a LibriSpeech, LibriTTS or VCTK folder, or a manifest (.jsonl)"
)
_SUBSET = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?$")
_VCTK_AUDIO = ("wav48_silence_trimmed", "wav48")
_UNPACKED = ("LibriSpeech", "LibriTTS", "LibriTTS_R", "VCTK-Corpus-0.92", "VCTK-Corpus")


@dataclass(frozen=True)
class Candidate:
    """A stretch of a file that may become an utterance; fields as in Utterance.

    Attributes:
        split: where the layout puts it; None: not said.
        seconds: None: to the end of the file.
        digest: sha256 that the file must have; None: not said.
    """

    id: str
    path: Path
    speaker: str
    split: str | None = None
    text: str | None = None
    sex: str | None = None
    start: float = 0.0
    seconds: float | None = None
    digest: str | None = None


@dataclass
class Found:
    """What a layout yields: candidates sorted by path, what was left aside and why, and remarks."""

    candidates: list[Candidate]
    skipped: list[tuple[Path, str]]
    notes: list[str]


def find(root: Path) -> Found:
    """The candidates below `root`, by the first layout that fits.

    Raises:
        UserError: if no speaker folder with audio files is there; it says what was found instead.
    """
    for name in _UNPACKED:  # the folder into which an archive was unpacked
        if (root / name).is_dir():
            root = root / name
            break
    folders = {entry.name for entry in _entries(root) if entry.is_dir()}
    if any(_SUBSET.match(name) for name in folders):
        found = _librispeech(root, sorted(folders))
    elif any(name in folders for name in _VCTK_AUDIO):
        found = _vctk(root, next(name for name in _VCTK_AUDIO if name in folders))
    elif any(name in folders and any(e.is_dir() for e in _entries(root / name)) for name in SPLITS):
        found = _pre_split(root, sorted(folders))
    else:
        found = Found(*_speakers(root, root, None), [])
    if not found.candidates:
        loose = [path for path, _ in found.skipped if path.suffix.lower() in SUFFIXES]
        got = f"{len(loose)} audio files outside any speaker folder" if loose else "no audio file"
        raise UserError(f"{root} holds {got}; {EXPECTED}")
    return found


def _speakers(folder: Path, root: Path, split: str | None) -> tuple[list[Candidate], list[tuple[Path, str]]]:
    """Each folder in `folder` is a speaker, with audio files at any depth."""
    candidates, skipped = [], []
    sexes = sexes_beside(folder, root)
    for entry in _entries(folder):
        if entry.is_file():
            if entry.suffix.lower() in SUFFIXES:
                skipped.append((entry, "lies outside any speaker folder"))
            continue
        for path, text in _audio_below(entry):
            candidates.append(_candidate(path, root, entry.name, split, text, sexes.get(entry.name)))
    return candidates, skipped


def _pre_split(root: Path, folders: list[str]) -> Found:
    found = Found([], [], [])
    for name in folders:
        if name in SPLITS:
            candidates, skipped = _speakers(root / name, root, name)
            found.candidates += candidates
            found.skipped += skipped
        elif any(True for _ in _audio_below(root / name)):
            found.skipped.append((root / name, "is not train, dev or test in a folder that is split into these"))
    found.skipped += [(e, "lies outside any speaker folder") for e in _entries(root) if e.suffix.lower() in SUFFIXES]
    return found


def _librispeech(root: Path, folders: list[str]) -> Found:
    """`<root>/train-clean-100/<speaker>/<chapter>/*`: the official parts are the splits, where train is among them."""
    found = Found([], [], [])
    subsets = {name: match[1] for name in folders if (match := _SUBSET.match(name))}
    official = "train" in subsets.values()
    if not official:
        found.notes.append("no official training part here: split by a hash of the speaker")
    for name in folders:
        if name in subsets:
            candidates, skipped = _speakers(root / name, root, subsets[name] if official else None)
            found.candidates += candidates
            found.skipped += skipped
        elif any(True for _ in _audio_below(root / name)):
            found.skipped.append((root / name, "is not a part of LibriSpeech such as train-clean-100"))
    return found


def _vctk(root: Path, audio: str) -> Found:
    """`<root>/wav48*/<speaker>/<speaker>_<n>[_mic1].flac`, `txt/<speaker>/<speaker>_<n>.txt`, speaker-info.txt."""
    sexes = sexes_beside(root / audio, root)
    found = Found([], [], [])
    doubled = 0
    for folder in (e for e in _entries(root / audio) if e.is_dir()):
        paths = [path for path, _ in _audio_below(folder)]
        stems = {path.stem for path in paths}
        for path in paths:
            stem = re.sub(r"_mic[12]$", "", path.stem)
            if path.stem.endswith("_mic2") and f"{stem}_mic1" in stems:
                doubled += 1
                continue
            words = root / "txt" / folder.name / f"{stem}.txt"
            text = words.read_text(encoding="utf-8", errors="replace").strip() if words.is_file() else None
            found.candidates.append(_candidate(path, root, folder.name, None, text or None, sexes.get(folder.name)))
    if doubled:
        found.notes.append(f"VCTK: {doubled} recordings by the second microphone are left aside")
    return found


def _candidate(path: Path, root: Path, speaker: str, split: str | None, text: str | None, sex: str | None) -> Candidate:
    return Candidate(path.relative_to(root).with_suffix("").as_posix(), path, speaker, split, text, sex)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden names."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _audio_below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Audio files at any depth, sorted, with their texts where known; a folder linked twice is entered once."""
    entered: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        audio = sorted(n for n in files if not n.startswith(".") and os.path.splitext(n)[1].lower() in SUFFIXES)
        if audio:
            texts = texts_beside(Path(here), files)
            for name in audio:
                yield Path(here, name), texts(Path(name).stem)
