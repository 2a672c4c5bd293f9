"""How speech corpora are stored: folder layouts, tables of speakers, transcripts, and manifests.

A manifest has one JSON object per line, one line per utterance. `path` (relative to the manifest) and `speaker` are
required. `id`, `split`, `text`, `sex`, `start` and `seconds` (in s), `sample_rate` (in Hz) and `digest` (sha256 of the
file) are optional. Either all lines have a split or none has.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snac_core.errors import UserError, nearest
from snac_core.files import write_text
from snac_runner.data.corpus import SPLITS, Utterance

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
"""Files that a corpus consists of; libsndfile decodes them."""

MEDIA_SUFFIXES = (".m4a", ".aac", ".wma", ".webm", ".mp4", ".m4v", ".mkv", ".mov", ".avi", ".aif", ".aiff", ".caf")
"""Other files with audio: PyAV or ffmpeg decodes them for a conversion; a corpus does not take them."""

EXPECTED_LAYOUT = (
    "expected <root>/<speaker>/**/*.wav (or flac, ogg, mp3, opus), the same below train/, dev/ and test/, "
    "a LibriSpeech, LibriTTS or VCTK folder, or a manifest (.jsonl)"
)
MANIFEST_NAME = "manifest.jsonl"
_LIBRISPEECH_SUBSET = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?$")
_VCTK_AUDIO = ("wav48_silence_trimmed", "wav48")
_ARCHIVE_FOLDERS = ("LibriSpeech", "LibriTTS", "LibriTTS_R", "VCTK-Corpus-0.92", "VCTK-Corpus")
_SPEAKER_TABLES = ("speakers.tsv", "SPEAKERS.TXT", "speaker-info.txt")
_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}


@dataclass(frozen=True)
class Candidate:
    """A file, or a segment of a file, that may become an utterance. The other fields are as in Utterance.

    Attributes:
        split: the split that the layout assigns; None if it assigns none.
        seconds: in s; None: to the end of the file.
        digest: the sha256 that the file must have; None if any is accepted.
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
class CorpusFiles:
    """The files of a corpus.

    Attributes:
        candidates: what may become an utterance, sorted by path.
        skipped: (path, reason) of each file or folder that does not fit the layout.
        notes: facts that matter for reading results, one sentence each.
    """

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_files(root: Path) -> CorpusFiles:
    """The files below `root`, read by the first layout that matches.

    Raises:
        UserError: if no speaker folder with audio files is there; the message says what was found instead.
    """
    for name in _ARCHIVE_FOLDERS:  # the top folder of an unpacked archive
        if (root / name).is_dir():
            root = root / name
            break
    folders = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    if any(_LIBRISPEECH_SUBSET.match(name) for name in folders):
        files = _librispeech(root, folders)
    elif any(name in folders for name in _VCTK_AUDIO):
        files = _vctk(root, next(name for name in _VCTK_AUDIO if name in folders))
    elif any(name in folders and any(e.is_dir() for e in _entries(root / name)) for name in SPLITS):
        files = _split_folders(root, folders)
    else:
        files = CorpusFiles()
        _add_speakers(files, root, root, None)
    if not files.candidates:
        loose = [path for path, _ in files.skipped if path.suffix.lower() in AUDIO_SUFFIXES]
        got = f"{len(loose)} audio files outside any speaker folder" if loose else "no audio file"
        raise UserError(f"{root} holds {got}; {EXPECTED_LAYOUT}")
    return files


def _add_speakers(files: CorpusFiles, folder: Path, root: Path, split: str | None) -> None:
    """Each folder in `folder` is a speaker, with audio files at any depth."""
    sexes = speaker_sexes(folder, root)
    for entry in _entries(folder):
        if entry.is_dir():
            files.candidates += [
                _candidate(path, root, entry.name, split, text, sexes.get(entry.name))
                for path, text in _audio_below(entry)
            ]
        elif entry.suffix.lower() in AUDIO_SUFFIXES:
            files.skipped.append((entry, "lies outside any speaker folder"))


def _split_folders(root: Path, folders: list[str]) -> CorpusFiles:
    """`<root>/train/<speaker>/**`, and the same below dev/ and test/."""
    files = CorpusFiles()
    for name in folders:
        if name in SPLITS:
            _add_speakers(files, root / name, root, name)
        elif _has_audio(root / name):
            files.skipped.append((root / name, "is not train, dev or test in a folder that is split into these"))
    loose = [e for e in _entries(root) if e.suffix.lower() in AUDIO_SUFFIXES]
    files.skipped += [(entry, "lies outside any speaker folder") for entry in loose]
    return files


def _librispeech(root: Path, folders: list[str]) -> CorpusFiles:
    """`<root>/train-clean-100/<speaker>/<chapter>/*`: the subsets give the splits if a train subset is among them."""
    files = CorpusFiles()
    subsets = {name: match[1] for name in folders if (match := _LIBRISPEECH_SUBSET.match(name))}
    official = "train" in subsets.values()
    if not official:
        files.notes.append("no official training part here: split by a hash of the speaker")
    for name in folders:
        if name in subsets:
            _add_speakers(files, root / name, root, subsets[name] if official else None)
        elif _has_audio(root / name):
            files.skipped.append((root / name, "is not a part of LibriSpeech such as train-clean-100"))
    return files


def _vctk(root: Path, audio: str) -> CorpusFiles:
    """`<root>/wav48*/<speaker>/<speaker>_<n>[_mic1].flac`, `txt/<speaker>/<speaker>_<n>.txt`, speaker-info.txt."""
    files = CorpusFiles()
    sexes = speaker_sexes(root / audio, root)
    second_microphone = 0
    for folder in (e for e in _entries(root / audio) if e.is_dir()):
        paths = [path for path, _ in _audio_below(folder)]
        stems = {path.stem for path in paths}
        for path in paths:
            stem = re.sub(r"_mic[12]$", "", path.stem)
            if path.stem.endswith("_mic2") and f"{stem}_mic1" in stems:
                second_microphone += 1
                continue
            transcript = root / "txt" / folder.name / f"{stem}.txt"
            text = _read_text(transcript).strip() if transcript.is_file() else None
            files.candidates.append(_candidate(path, root, folder.name, None, text or None, sexes.get(folder.name)))
    if second_microphone:
        files.notes.append(f"VCTK: {second_microphone} recordings by the second microphone are left out")
    return files


def _candidate(path: Path, root: Path, speaker: str, split: str | None, text: str | None, sex: str | None) -> Candidate:
    return Candidate(path.relative_to(root).with_suffix("").as_posix(), path, speaker, split, text, sex)


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted, without hidden names."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _has_audio(folder: Path) -> bool:
    return next(_audio_below(folder), None) is not None


def _audio_below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Audio files at any depth, sorted, with their texts if known; a folder linked twice is entered once."""
    entered: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(here, name) for name in sorted(names) if not name.startswith(".")]
        audio = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
        if audio:
            text_of = transcripts(Path(here), names)
            for path in audio:
                yield path, text_of(path.stem)


def speaker_sexes(folder: Path, root: Path) -> dict[str, str]:
    """Speaker -> "F" or "M", from the first table in `folder`, in `root`, or in the folder above either.

    The tables are speakers.tsv (columns speaker and sex, or LibriTTS's READER and GENDER), LibriSpeech's SPEAKERS.TXT
    (`14 | F | train-clean-360 | ...`) and VCTK's speaker-info.txt (`p225  23  F  English ...`, also without the p).
    """
    for place in dict.fromkeys((folder, root, folder.parent, root.parent)):
        for name in _SPEAKER_TABLES:
            if (place / name).is_file():
                text = _read_text(place / name)
                return _sexes_of_tsv(text) if name == "speakers.tsv" else _sexes_of_lines(text)
    return {}


def _sexes_of_tsv(text: str) -> dict[str, str]:
    sexes: dict[str, str] = {}
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        cells = {str(key).strip().lower(): str(value).strip() for key, value in row.items() if key}
        speaker = cells.get("speaker") or cells.get("reader")
        sex = _SEXES.get((cells.get("sex") or cells.get("gender") or "").lower())
        if speaker and sex:
            sexes[speaker] = sex
    return sexes


def _sexes_of_lines(text: str) -> dict[str, str]:
    sexes: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(";"):
            continue
        cells = line.replace("|", " ").split()
        sex = next((_SEXES[cell.lower()] for cell in cells[1:3] if cell.lower() in _SEXES), None)
        if sex:
            sexes[cells[0]] = sex
            if cells[0].isdigit():
                sexes["p" + cells[0]] = sex  # VCTK 0.80: the folders have the letter, the table does not
    return sexes


def transcripts(folder: Path, names: Iterable[str]) -> Callable[[str], str | None]:
    """A function from the stem of an audio file to its text, for a folder that contains files of these names.

    Texts are in LibriSpeech's `*.trans.txt` (a line per utterance) or, per audio file, in `<stem>.normalized.txt`
    (LibriTTS) or `<stem>.txt`.
    """
    names = set(names)
    lines: dict[str, str] = {}
    for name in sorted(names):
        if name.endswith(".trans.txt"):
            for line in _read_text(folder / name).splitlines():
                stem, _, text = line.strip().partition(" ")
                lines[stem] = text.strip()

    def text_of(stem: str) -> str | None:
        if stem in lines:
            return lines[stem] or None
        for name in (f"{stem}.normalized.txt", f"{stem}.txt"):
            if name in names:
                return _read_text(folder / name).strip() or None
        return None

    return text_of


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


_MANIFEST_KEYS: dict[str, type | tuple[type, ...]] = {
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
        UserError: naming the invalid line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; a manifest has one JSON object per line") from None
    candidates = [_manifest_candidate(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not candidates:
        raise UserError(f"{path} is empty; a manifest has one JSON object per line, with path and speaker")
    without = [c for c in candidates if c.split is None]
    if without and len(without) < len(candidates):
        raise UserError(f"{path}: {without[0].id!r} has no split while others have; give every line one, or none")
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.id in seen:
            raise UserError(f"{path}: id {candidate.id!r} occurs twice; ids must differ")
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
        if key not in _MANIFEST_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, _MANIFEST_KEYS)}")
        if not isinstance(value, _MANIFEST_KEYS[key]) or isinstance(value, bool):
            expected = "text" if _MANIFEST_KEYS[key] is str else "a number"
            raise UserError(f"{where}: {key} is {value!r}; expected {expected}")
    for key in ("path", "speaker"):
        if not row.get(key):
            raise UserError(f"{where}: no {key!r}; path and speaker are required")
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


def write_manifest(path: Path, splits: Mapping[str, Iterable[Utterance]]) -> None:
    """Write the utterances of each split as a manifest, with paths relative to it."""
    folder = path.parent.absolute()
    lines = []
    for split in SPLITS:
        for u in splits.get(split, ()):
            row = {
                "id": u.id,
                "path": Path(os.path.relpath(u.path.absolute(), folder)).as_posix(),
                "speaker": u.speaker,
                "split": split,
                "start": u.start or None,
                "seconds": u.seconds,
                "sample_rate": u.sample_rate,
                "sex": u.sex,
                "text": u.text,
                "digest": u.digest,
            }
            lines.append(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
