"""How speech corpora are stored: folder layouts, tables of speakers, transcripts, and manifests.

A manifest has one JSON object per line, one line per utterance; or it is a CSV file with a line of names above. `path`
(relative to the manifest) and `speaker` are required. `id`, `split`, `text`, `sex`, `start` and `seconds` (in s),
`sample_rate` (in Hz) and `digest` (sha256 of the file) are optional. Either all lines have a split or none has.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from snac_core.errors import UserError, nearest
from snac_core.files import parse_json, writing
from snac_runner.data.corpus import SPLITS, Utterance
from snac_runner.data.decode import AUDIO_SUFFIXES, DECODER_NEEDED, HEADERLESS, MEDIA_SUFFIXES, has_decoder
from snac_runner.data.utterances import Packed

EXPECTED_LAYOUT = (
    "expected <root>/<speaker>/**/*.wav (or flac, ogg, mp3, opus), the same below train/, dev/ and test/, "
    "a LibriSpeech, LibriTTS or VCTK folder, a manifest (.jsonl or .csv), a dataset saved by the datasets library, or "
    "hf:ID of the Hugging Face Hub"
)
MANIFEST_NAME = "manifest.jsonl"
MANIFEST_SUFFIXES = (".jsonl", ".csv")
_LIBRISPEECH_SUBSET = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?$")
_VCTK_AUDIO = ("wav48_silence_trimmed", "wav48")
_ARCHIVE_FOLDERS = ("LibriSpeech", "LibriTTS", "LibriTTS_R", "VCTK-Corpus-0.92", "VCTK-Corpus")
_SPEAKER_TABLES = ("speakers.tsv", "SPEAKERS.TXT", "speaker-info.txt")
_LOOSE = "lies outside any speaker folder"
_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file, or a segment of a file, that may become an utterance. The other fields are as in Utterance.

    Attributes:
        split: the split that the layout assigns; None if it assigns none.
        seconds: in s; None: to the end of the file.
        digest: the sha256 that the file must have; None if any is accepted.
    """

    id: str
    path: str
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
        not_taken: suffix to number of files that may have audio but cannot be decoded here.
        decoder: whether PyAV or ffmpeg is there.
    """

    candidates: Packed[Candidate] = field(default_factory=lambda: Packed(Candidate))
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_taken: Counter[str] = field(default_factory=Counter)
    decoder: bool = field(default_factory=lambda: has_decoder())

    def take(self, path: str) -> bool:
        """Whether a file is audio that can be decoded; counts a file that cannot, if it may have audio."""
        suffix = os.path.splitext(path)[1].lower()
        if suffix in AUDIO_SUFFIXES or (suffix in MEDIA_SUFFIXES and self.decoder):
            return True
        if suffix in MEDIA_SUFFIXES or suffix in HEADERLESS:
            self.not_taken[suffix] += 1
        return False

    @property
    def reasons(self) -> list[str]:
        """A sentence for each suffix in `not_taken`: how many files, why they are not taken, and how to take them."""
        return [
            f"{count} {suffix} file{'s are' if count > 1 else ' is'} not taken: "
            + (
                "samples without a header have no sample rate; expected wav or flac, as `ffmpeg -f s16le -ar 16000 -i "
                f"a{suffix} a.wav` writes it (for 16 bits at 16 kHz)"
                if suffix in HEADERLESS
                else f"decoding needs {DECODER_NEEDED}"
            )
            for suffix, count in sorted(self.not_taken.items())
        ]


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
        loose = [path for path, reason in files.skipped if reason == _LOOSE]
        got = f"{len(loose)} audio files outside any speaker folder" if loose else "no audio file"
        raise UserError("; ".join([f"{root} holds {got}", *files.reasons, EXPECTED_LAYOUT]))
    return files


def _add_speakers(files: CorpusFiles, folder: Path, root: Path, split: str | None) -> None:
    """Each folder in `folder` is a speaker, with audio files at any depth."""
    sexes = speaker_sexes(folder, root)
    for entry in _entries(folder):
        if entry.is_dir():
            files.candidates.extend(
                _candidate(path, root, entry.name, split, text, sexes.get(entry.name))
                for path, text in _audio_below(entry, files.take)
            )
        elif files.take(entry.name):
            files.skipped.append((entry, _LOOSE))


def _split_folders(root: Path, folders: list[str]) -> CorpusFiles:
    """`<root>/train/<speaker>/**`, and the same below dev/ and test/."""
    files = CorpusFiles()
    for name in folders:
        if name in SPLITS:
            _add_speakers(files, root / name, root, name)
        elif _has_audio(root / name, files):
            files.skipped.append((root / name, "is not train, dev or test in a folder that is split into these"))
    files.skipped += [(e, _LOOSE) for e in _entries(root) if e.is_file() and files.take(e.name)]
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
        elif _has_audio(root / name, files):
            files.skipped.append((root / name, "is not a part of LibriSpeech such as train-clean-100"))
    return files


def _vctk(root: Path, audio: str) -> CorpusFiles:
    """`<root>/wav48*/<speaker>/<speaker>_<n>[_mic1].flac`, `txt/<speaker>/<speaker>_<n>.txt`, speaker-info.txt."""
    files = CorpusFiles()
    sexes = speaker_sexes(root / audio, root)
    second_microphone = 0
    for folder in (e for e in _entries(root / audio) if e.is_dir()):
        paths = [path for path, _ in _audio_below(folder, files.take)]
        stems = {_stem(path) for path in paths}
        for path in paths:
            stem = re.sub(r"_mic[12]$", "", _stem(path))
            if _stem(path).endswith("_mic2") and f"{stem}_mic1" in stems:
                second_microphone += 1
                continue
            transcript = root / "txt" / folder.name / f"{stem}.txt"
            text = _read_text(transcript).strip() if transcript.is_file() else None
            files.candidates.append(_candidate(path, root, folder.name, None, text or None, sexes.get(folder.name)))
    if second_microphone:
        files.notes.append(f"VCTK: {second_microphone} recordings by the second microphone are left out")
    return files


def _candidate(path: str, root: Path, speaker: str, split: str | None, text: str | None, sex: str | None) -> Candidate:
    id = os.path.splitext(path.removeprefix(f"{root}{os.sep}"))[0].replace(os.sep, "/")
    return Candidate(id, path, speaker, split, text, sex)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted, without hidden names."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _has_audio(folder: Path, files: CorpusFiles) -> bool:
    return next(_audio_below(folder, files.take), None) is not None


def _audio_below(folder: Path, take: Callable[[str], bool]) -> Iterator[tuple[str, str | None]]:
    """The files to take at any depth, sorted, with their texts if known; a folder linked twice is entered once."""
    entered: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        audio = [name for name in sorted(names) if not name.startswith(".") and take(name)]
        if audio:
            text_of = transcripts(Path(here), names)
            for name in audio:
                yield os.path.join(here, name), text_of(_stem(name))


def tree_state(root: Path) -> str:
    """A digest of names, sizes and times of all that the files of a corpus folder are found by; no file is read.

    Raises:
        OSError: if a folder cannot be read.
    """
    digest, entered, folders = hashlib.blake2b(f"{has_decoder()}".encode()), set[str](), [str(root)]
    for name in _SPEAKER_TABLES:
        with suppress(OSError):
            state = os.stat(root.parent / name)
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}".encode())
    while folders:
        folder = folders.pop()
        rows = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if entry.is_symlink():  # a folder linked twice is entered once
                        real = os.path.realpath(entry.path)
                        if real in entered:
                            continue
                        entered.add(real)
                    folders.append(entry.path)
                    rows.append((entry.name, 0, 0))
                    continue
                try:
                    state = entry.stat()
                    rows.append((entry.name, state.st_size, state.st_mtime_ns))
                except OSError:  # a link that leads nowhere
                    rows.append((entry.name, -1, 0))
        rows.sort()
        digest.update(repr((folder[len(str(root)) :], rows)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


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


def read_manifest(path: Path) -> Packed[Candidate]:
    """The candidates of a manifest, in its order.

    Raises:
        UserError: naming the invalid line.
    """
    read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    candidates = Packed(Candidate)
    try:
        candidates.extend(_manifest_candidate(row, path, f"{path}, line {number}") for number, row in read(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; a manifest has one JSON object per line") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not candidates:
        raise UserError(f"{path} is empty; a manifest has one JSON object per line, with path and speaker")
    without = next((c for c in candidates if c.split is None), None)
    if without and any(c.split for c in candidates):
        raise UserError(f"{path}: {without.id!r} has no split while others have; give every line one, or none")
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.id in seen:
            raise UserError(f"{path}: id {candidate.id!r} occurs twice; ids must differ")
        seen.add(candidate.id)
    return candidates


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, value) of each line of JSON."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, parse_json(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error})") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, cells by column) of each line of a CSV file; empty cells are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for cells in reader:
            row: dict[str, Any] = {key: value for key, value in cells.items() if value or key is None}
            if None in row:
                raise UserError(f"{path}, line {reader.line_num}: more cells than columns; quote texts with commas")
            for key in row.keys() & {"start", "seconds", "sample_rate"}:
                with suppress(ValueError):
                    row[key] = int(row[key]) if key == "sample_rate" else float(row[key])
            yield reader.line_num, row


def _manifest_candidate(row: Any, path: Path, where: str) -> Candidate:
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"path": "a.wav", "speaker": "ann"}}, got {row!r:.40}')
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
        path=os.path.join(path.parent, row["path"]),
        speaker=intern(row["speaker"]),
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
    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
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
                file.write(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")
