"""What lies beside the audio in speech corpora: who is a woman or a man, and what is said.

Manifests: one JSON object a line, one line an utterance.

`path` (relative to the manifest) and `speaker` are needed. `id`, `split`, `text`, `sex`, `start` and `seconds` (s) and
`digest` (sha256 of the file) may be given. Either every line has a split or none.


Where the audio files are and whose they are, for each layout of folders that speech corpora come in."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snac_core.errors import UserError, nearest
from snac_core.files import write_text
from snac_runner.data.corpus import SPLITS, Utterance

_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
_TABLES = ("speakers.tsv", "SPEAKERS.TXT", "speaker-info.txt")


def sexes_beside(folder: Path, root: Path) -> dict[str, str]:
    """Speaker -> "F" or "M", from the first table found in `folder`, `root`, or the two folders above them.

    Read are speakers.tsv (columns speaker and sex, or LibriTTS's READER and GENDER), LibriSpeech's SPEAKERS.TXT
    (`14 | F | train-clean-360 | ...`) and VCTK's speaker-info.txt (`p225  23  F  English ...`, also without the p).
    """
    for place in dict.fromkeys((folder, root, folder.parent, root.parent)):
        for name in _TABLES:
            if (place / name).is_file():
                text = (place / name).read_text(encoding="utf-8", errors="replace")
                return _from_tsv(text) if name == "speakers.tsv" else _from_lines(text)
    return {}


def _from_tsv(text: str) -> dict[str, str]:
    sexes: dict[str, str] = {}
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        cells = {str(key).strip().lower(): str(value).strip() for key, value in row.items() if key}
        speaker = cells.get("speaker") or cells.get("reader")
        sex = _SEXES.get((cells.get("sex") or cells.get("gender") or "").lower())
        if speaker and sex:
            sexes[speaker] = sex
    return sexes


def _from_lines(text: str) -> dict[str, str]:
    sexes: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(";"):
            continue
        cells = line.replace("|", " ").split()
        sex = next((_SEXES[cell.lower()] for cell in cells[1:3] if cell.lower() in _SEXES), None)
        if sex:
            sexes[cells[0]] = sex
            if cells[0].isdigit():
                sexes["p" + cells[0]] = sex  # VCTK 0.80 drops the letter of its folders
    return sexes


def texts_beside(folder: Path, files: Iterable[str]) -> Callable[[str], str | None]:
    """A function from an utterance's stem to its text, for the audio files in `folder`.

    Read are LibriSpeech's `*.trans.txt` (a line per utterance) and, beside each file, `<stem>.normalized.txt`
    (LibriTTS) or `<stem>.txt`.
    """
    names = set(files)
    lines: dict[str, str] = {}
    for name in sorted(names):
        if name.endswith(".trans.txt"):
            for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
                stem, _, text = line.strip().partition(" ")
                lines[stem] = text.strip()

    def text_of(stem: str) -> str | None:
        if stem in lines:
            return lines[stem] or None
        for name in (f"{stem}.normalized.txt", f"{stem}.txt"):
            if name in names:
                return (folder / name).read_text(encoding="utf-8", errors="replace").strip() or None
        return None

    return text_of


NAME = "manifest.jsonl"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "speaker": str,
    "id": str,
    "split": str,
    "text": str,
    "sex": str,
    "start": (int, float),
    "seconds": (int, float),
    "sample_rate": int,
    "digest": str,
}


def read_manifest(path: Path) -> list[Candidate]:
    """The candidates of a manifest, in its order.

    Raises:
        UserError: naming the line that is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; a manifest has one JSON object a line") from None
    candidates = [_manifest_candidate(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not candidates:
        raise UserError(f"{path} is empty; a manifest has one JSON object a line, with path and speaker")
    without = [c for c in candidates if c.split is None]
    if without and len(without) < len(candidates):
        raise UserError(f"{path}: {without[0].id!r} has no split while others have; give every line one, or none")
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.id in seen:
            raise UserError(f"{path}: id {candidate.id!r} is there twice; ids must differ")
        seen.add(candidate.id)
    return candidates


def _manifest_candidate(line: str, path: Path, number: int) -> Candidate:
    where = f"{path}, line {number}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"path": "a.wav", "speaker": "ann"}}, got {line[:40]!r}')
    row = {key: value for key, value in row.items() if value is not None}
    for key, value in row.items():
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is {value!r}; expected {'a number' if key in _NUMBERS else 'text'}")
    for key in ("path", "speaker"):
        if not row.get(key):
            raise UserError(f"{where}: no {key!r}; path and speaker are needed")
    if row.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: unknown split {row['split']!r}{nearest(row['split'], SPLITS)}")
    if row.get("sex", "F") not in ("F", "M"):
        raise UserError(f"{where}: sex is {row['sex']!r}; expected F, M, or nothing")
    if row.get("start", 0) < 0 or row.get("seconds", 1) <= 0:
        raise UserError(f"{where}: start must not be negative and seconds must be above 0")
    return Candidate(
        id=row.get("id") or Path(row["path"]).with_suffix("").as_posix(),
        path=path.parent / row["path"],
        speaker=row["speaker"],
        split=row.get("split"),
        text=row.get("text"),
        sex=row.get("sex"),
        start=float(row.get("start", 0.0)),
        seconds=float(row["seconds"]) if "seconds" in row else None,
        digest=row.get("digest"),
    )


_NUMBERS = ("start", "seconds", "sample_rate")


def write_manifest(path: Path, splits: Mapping[str, Iterable[Utterance]]) -> None:
    """Write utterances and their splits; paths are relative to the manifest."""
    home = path.parent.absolute()
    lines = []
    for split in SPLITS:
        for u in splits.get(split, ()):
            row: dict[str, Any] = {
                "id": u.id,
                "path": Path(os.path.relpath(u.path.absolute(), home)).as_posix(),
                "speaker": u.speaker,
                "split": split,
                "start": u.start,
                "seconds": u.seconds,
                "sample_rate": u.sample_rate,
                "sex": u.sex,
                "text": u.text,
                "digest": u.digest,
            }
            if not u.start:
                del row["start"]
            lines.append(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


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
