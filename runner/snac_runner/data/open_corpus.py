"""Open a corpus: find its files, check them, and assign speakers to splits; and write it down as a manifest."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from snac_core.errors import UserError
from snac_core.files import printable
from snac_runner.data.cache import cache_folder
from snac_runner.data.checks import LONG_SECONDS, AudioCheck, FileSegment, Piece, check_audio_files
from snac_runner.data.corpus import DEV_SHARE, MIN_SPEAKERS, SPLITS, TEST_SHARE, Corpus, split_speakers
from snac_runner.data.decode import has_decoder
from snac_runner.data.formats import (
    EXPECTED_LAYOUT,
    MANIFEST_NAME,
    MANIFEST_SUFFIXES,
    Candidate,
    CorpusFiles,
    find_files,
    read_manifest,
    tree_state,
    write_manifest,
)
from snac_runner.data.hugging_face import exported, is_dataset
from snac_runner.data.utterances import Columns, Packed, Rows, StoredColumns, Utterance, Utterances, store, stored

_VERSION = 1  # of what is stored; other versions are ignored
_log = logging.getLogger(__name__)


def open_corpus(
    path: str | Path,
    *,
    seed: int = 0,
    dev: float = DEV_SHARE,
    test: float = TEST_SHARE,
    warn: Callable[[str], None] = _log.warning,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """The corpus at `path`.

    A corpus that was opened before is read from the cache as long as its files have the same names, sizes and times.

    Args:
        path: a folder of speakers, one split into train/, dev/ and test/, a LibriSpeech, LibriTTS or VCTK folder, a
            manifest (.jsonl or .csv), or a data set (see `snac_runner.data.hugging_face`). If the folder has a
            manifest.jsonl, only the manifest is read.
        seed: of the split by speaker, if the data is not split already.
        dev: fraction of the speakers for dev, if the data is not split already.
        test: fraction of the speakers for test, likewise.
        warn: called with a message for each file that is skipped, and for each suffix that is not taken; the default
            logs it.
        progress: called with (done, total) while files are decoded for the first time.

    Raises:
        UserError: if there is no usable audio, only one speaker, or a speaker in two splits.
    """
    root = exported(path, progress) if is_dataset(path) else Path(path)
    manifest = _manifest_of(root)
    folder = root if root.is_dir() else root.parent
    name = hashlib.sha256(repr((str(root.absolute()), seed, dev, test)).encode()).hexdigest()[:16]
    file = cache_folder() / "corpora" / f"{name}.safetensors"
    found = _stored_corpus(file, folder, manifest)
    if found is None:
        state = "" if manifest else _tree_state(root)
        corpus, not_taken = _scanned(root, manifest, (seed, dev, test), progress)
        skipped = [[str(place).removeprefix(f"{folder}{os.sep}"), reason] for place, reason in corpus.skipped]
        about = {
            "version": _VERSION,
            "state": _manifest_state(manifest, corpus.parts, skipped) if manifest else state,
            "name": corpus.name,
            "skipped": skipped,
            "notes": corpus.notes,
            "not taken": not_taken,
            "digest": corpus.digest,
        }
        with suppress(OSError, ValueError, KeyError):
            store(file, corpus.parts, about)
            columns, _ = stored(file)
            corpus = replace(corpus, splits=_mapped(columns, file, folder, corpus.digest), stored_digest=corpus.digest)
    else:
        corpus, not_taken = found
    for place, reason in corpus.skipped:
        warn(f"skipped {printable(place)}: {reason}")
    for reason in not_taken:
        warn(reason)
    return corpus


def _manifest_of(root: Path) -> Path | None:
    """The manifest that describes a corpus; None if the folder does.

    Raises:
        UserError: if there is neither.
    """
    if not root.exists():
        raise UserError(f"no folder {root}; {EXPECTED_LAYOUT}")
    if root.is_dir():
        return root / MANIFEST_NAME if (root / MANIFEST_NAME).is_file() else None
    if root.suffix.lower() not in MANIFEST_SUFFIXES:
        raise UserError(f"{root} is a file, not a folder; {EXPECTED_LAYOUT}")
    return root


def _tree_state(root: Path) -> str:
    try:
        return tree_state(root)
    except PermissionError as error:
        raise UserError(f"no permission to read {error.filename}") from None


def _manifest_state(manifest: Path, splits: Mapping[str, Utterances], skipped: Iterable[Sequence[str]]) -> str:
    """A digest of sizes and times of a manifest and of the files that it names, relative to it, in any order."""
    used = (path for part in splits.values() for path in part.paths())
    total = 0
    for path in {manifest.name, *used, *(place for place, _ in skipped)}:
        try:
            state = os.stat(os.path.join(manifest.parent, path))
            text = f"{path} {state.st_size} {state.st_mtime_ns}"
        except OSError:
            text = f"{path} missing"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        total += int.from_bytes(digest, "little")
    return f"{total % 2**128:032x} {has_decoder()}"


def _stored_corpus(file: Path, folder: Path, manifest: Path | None) -> tuple[Corpus, list[str]] | None:
    """The corpus as it was stored, and why files are not taken; None if something has changed since."""
    try:
        columns, about = stored(file)
        if about["version"] != _VERSION:
            return None
        splits = _mapped(columns, file, folder, about["digest"])
        skipped = tuple((folder / place, reason) for place, reason in about["skipped"])
        state = _manifest_state(manifest, splits, about["skipped"]) if manifest else _tree_state(folder)
        if state != about["state"]:
            return None
        return Corpus(folder, about["name"], splits, skipped, tuple(about["notes"]), about["digest"]), about[
            "not taken"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(columns: Mapping[str, Columns], file: Path, folder: Path, digest: str) -> dict[str, Utterances]:
    return {split: Utterances(columns[split], folder, StoredColumns(file, split, digest)) for split in SPLITS}


def _scanned(
    root: Path,
    manifest: Path | None,
    split: tuple[int, float, float],
    progress: Callable[[int, int], None] | None,
) -> tuple[Corpus, list[str]]:
    """The corpus, from its files, and why files are not taken."""
    files = CorpusFiles(read_manifest(manifest)) if manifest else _found(root)
    folder = root if root.is_dir() else root.parent
    with closing(_Usable(files)) as usable:
        usable.add(check_audio_files(_Segments(files.candidates), root, progress))
        count = len(files.candidates)
        files.candidates = Packed(Candidate)  # of a million files, 0.15 GB that are free from here on
        first = f"{usable.skipped[0][0]}, {usable.skipped[0][1]}" if usable.skipped else "?"
        speakers = usable.speakers()
        if not speakers:
            raise UserError(f"{root}: none of {count} audio files is usable; the first, {first}")
        if len(speakers) < 2:
            skipped = f" ({len(usable.skipped)} of the files cannot be used: {first})" if usable.skipped else ""
            raise UserError(
                f"{root} holds one speaker, {min(speakers)!r}{skipped}; conversion needs at least two; "
                f"{EXPECTED_LAYOUT}"
            )
        split_of, notes = _assign_splits(speakers, *split)
        splits = {
            name: Utterances.of((u for given, u in usable.utterances() if split_of(u.speaker, given) == name), folder)
            for name in SPLITS
        }
    corpus = Corpus(
        root=folder,
        name=folder.resolve().name if root.is_dir() or root.name == MANIFEST_NAME else root.stem,
        splits=splits,
        skipped=tuple(usable.skipped),
        notes=(*files.notes, *usable.notes(), *notes, *_single_utterance_notes(splits)),
    )
    return corpus, files.reasons


def _found(root: Path) -> CorpusFiles:
    try:
        return find_files(root)
    except PermissionError as error:
        raise UserError(f"no permission to read {error.filename}") from None


def scan(
    path: str | Path,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    warn: Callable[[str], None] = _log.warning,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Open a corpus and write its manifest, which from then on fixes its files and splits.

    Args:
        path: as for open_corpus; so are seed, warn and progress.
        out: the manifest to write, or its folder; None: manifest.jsonl in the folder of the corpus.

    Returns:
        The corpus that the manifest describes.

    Raises:
        UserError: as open_corpus does; also if the manifest exists already, or cannot be written.
    """
    path = Path(path)
    manifest = Path(out) if out is not None else (path if path.is_dir() else path.parent) / MANIFEST_NAME
    if manifest.is_dir():
        manifest = manifest / MANIFEST_NAME
    if manifest.suffix.lower() != ".jsonl":
        raise UserError(f"--out {manifest}: expected the name of a .jsonl file")
    if manifest.exists():
        raise UserError(f"{manifest} exists already and fixes the split; remove it, or write another one")
    corpus = open_corpus(path, seed=seed, warn=warn, progress=progress)
    try:
        write_manifest(manifest, corpus.splits)
    except OSError as error:
        raise UserError(f"cannot write {manifest}: {error.strerror}; give a writable path with --out") from None
    return corpus


_TOUCHING = 0.0005  # s; an end can be a rounding error behind the start of what follows
_COLUMNS = tuple(field.name for field in fields(Utterance))
_INSERT = f"INSERT INTO rows VALUES ({', '.join('?' * (2 + len(_COLUMNS)))})"


class _Segments(Rows[FileSegment]):
    """What is checked of each candidate."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates

    def __len__(self) -> int:
        return len(self.candidates)

    def at(self, row: int) -> FileSegment:
        candidate = self.candidates[row]
        return candidate.path, candidate.start, candidate.seconds


class _Usable:
    """The candidates that are usable, and why the others are not.

    The usable ones are in a temporary database on disk: a million of them as objects take half a gigabyte.

    Attributes:
        skipped: (path, reason).
        cut: number of long files that were cut into pieces.
    """

    def __init__(self, files: CorpusFiles) -> None:
        self.files = files
        self.skipped = list(files.skipped)
        self.cut = self.pieces = 0
        self._rows = sqlite3.connect("")  # deleted when it is closed
        self._rows.execute(f"CREATE TABLE rows (given, file_id, {', '.join(_COLUMNS)})")
        self._rows.execute("CREATE INDEX of_file ON rows (file_id)")
        self._rows.execute("CREATE INDEX of_audio ON rows (digest)")

    def close(self) -> None:
        """Delete the database."""
        self._rows.close()

    def add(self, checks: Iterator[AudioCheck]) -> None:
        """Add each candidate by its check."""
        for c, check in zip(self.files.candidates, checks, strict=True):
            reason = check.problem
            if not reason and c.digest and c.digest != check.digest:
                reason = "is not the file of the manifest: its bytes have changed"
            if reason := reason or self._duplicate(c, check):
                self.skipped.append((Path(c.path), reason))
                continue
            file_id = c.id
            if self._first("SELECT 1 FROM rows WHERE file_id = ?", _encoded(file_id)):  # a.wav next to a.flac
                file_id += os.path.splitext(c.path)[1]
            self.cut += bool(check.pieces)
            self.pieces += len(check.pieces)
            whole = Piece(c.start, check.seconds, check.level)
            for piece in check.pieces or (whole,):
                id, text = (file_id, c.text) if piece is whole else (f"{file_id}@{piece.start:07.2f}", None)
                row = (
                    id, c.path, c.speaker, piece.seconds, check.sample_rate, piece.start, text, c.sex, check.digest,
                    piece.level,
                )  # fmt: skip
                self._rows.execute(_INSERT, tuple(map(_encoded, (c.split, file_id, *row))))

    def speakers(self) -> dict[str, set[str | None]]:
        """Each speaker's splits, as the data gives them."""
        found: dict[str, set[str | None]] = {}
        for speaker, given in self._rows.execute("SELECT DISTINCT speaker, given FROM rows"):
            found.setdefault(_decoded(speaker), set()).add(_decoded(given))
        return found

    def utterances(self) -> Iterator[tuple[str | None, Utterance]]:
        """(split that the data gives, utterance), sorted by id."""
        for row in self._rows.execute(f"SELECT given, {', '.join(_COLUMNS)} FROM rows ORDER BY id"):
            given, id, path, *rest = map(_decoded, row)
            yield given, Utterance(id, Path(path), *rest)

    def _duplicate(self, c: Candidate, check: AudioCheck) -> str:
        """Why a candidate duplicates an earlier one (of a file with the same bytes), which would leak between splits
        or references; "" if it does not."""
        end = c.start + check.seconds
        found = self._first(
            "SELECT path, file_id, start, start + seconds FROM rows WHERE digest = ? AND start < ? "
            "AND start + seconds > ?",
            _encoded(check.digest), end - _TOUCHING, c.start + _TOUCHING,
        )  # fmt: skip
        if not found:
            return ""
        path, file_id, first, last = map(_decoded, found)
        if path != c.path:
            return f"is the same audio as {path}"
        return f"overlaps {file_id!r}: {c.start:.3f} to {end:.3f} s, and {first:.3f} to {last:.3f} s"

    def _first(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._rows.execute(query, values).fetchone()
        return row

    def notes(self) -> list[str]:
        """What was done with long files."""
        if not self.cut:
            return []
        return [f"{self.cut} files of more than {LONG_SECONDS:.0f} s were cut at pauses into {self.pieces} utterances"]


def _encoded(value: Any) -> Any:
    """A value of a row as the database stores it: names of files need not be UTF-8. Bytes sort as the texts do."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def _assign_splits(
    speakers: Mapping[str, set[str | None]], seed: int, dev: float, test: float
) -> tuple[Callable[[str, str | None], str], list[str]]:
    """A function from a speaker and the split that the data gives an utterance to its split, and notes.

    If the data has a train split but no dev or test, they are taken from train.

    Args:
        speakers: each speaker's splits, as the data gives them.
        seed, dev, test: as for `open_corpus`.
    """
    given = {split for splits in speakers.values() for split in splits if split}
    if given and ("train" not in given or given == set(SPLITS)):
        return lambda _, split: split or "train", []
    shares = {split: 0.0 if split in given else share for split, share in (("dev", dev), ("test", test))}
    movable = {speaker for speaker, splits in speakers.items() if splits & {None, "train"}}
    assigned = split_speakers(movable, seed=seed, **shares)
    notes: list[str] = []
    missing = " and ".join(split for split, share in shares.items() if share > 0)
    if given and missing:
        notes.append(f"no {missing} part here: taken from the training speakers by a hash of the name (seed {seed})")
    counts = Counter(assigned.values())
    notes += [
        f"{split} is empty: {len(assigned)} speakers are too few to reserve {MIN_SPEAKERS} for it"
        for split, share in shares.items()
        if share > 0 and not counts[split]
    ]
    return lambda speaker, split: split if split in ("dev", "test") else assigned[speaker], notes


def _single_utterance_notes(splits: Mapping[str, Utterances]) -> list[str]:
    """A note for each split that has speakers with only one utterance."""
    notes = []
    for split, utterances in splits.items():
        single = int((utterances.counts == 1).sum())
        if single:
            notes.append(
                f"{split}: {single} of {len(utterances.speakers)} speakers have one utterance; "
                "their conditioning and scoring references are non-overlapping halves of it"
            )
    return notes
