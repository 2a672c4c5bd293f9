"""Open a corpus: find its files, check them, and assign speakers to splits; and write it down as a manifest."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from snac_core.errors import UserError
from snac_runner.data.cache import cache_folder
from snac_runner.data.checks import LONG_SECONDS, AudioCheck, FileSegment, check_audio_files
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
from snac_runner.data.utterances import Columns, Rows, StoredColumns, Utterance, Utterances, store, stored

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
        corpus, not_taken, paths = _scanned(root, manifest, (seed, dev, test), progress)
        about = {
            "version": _VERSION,
            "state": _manifest_state(manifest, paths) if manifest else state,
            "name": corpus.name,
            "skipped": [[str(place).removeprefix(f"{folder}{os.sep}"), reason] for place, reason in corpus.skipped],
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
        warn(f"skipped {place}: {reason}")
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


def _manifest_state(manifest: Path, paths: Iterable[str]) -> str:
    """A digest of sizes and times of a manifest and of the files that it names, in any order and relative to it."""
    total = 0
    for path in {manifest.name, *paths}:
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
        if manifest is None:
            state = _tree_state(folder)
        else:
            used = (path for part in splits.values() for path in part.paths())
            state = _manifest_state(manifest, chain(used, (place for place, _ in about["skipped"])))
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
) -> tuple[Corpus, list[str], set[str]]:
    """The corpus, from its files; why files are not taken; and the paths of all files that may be part of it."""
    files = CorpusFiles(read_manifest(manifest)) if manifest else _found(root)
    usable = _Usable(files)
    usable.add(check_audio_files(_Segments(files.candidates), root, progress))
    prefix = f"{root if root.is_dir() else root.parent}/"
    paths = {Path(c.path).as_posix().removeprefix(prefix) for c in files.candidates} if manifest else set()
    first = f"{usable.skipped[0][0]}, {usable.skipped[0][1]}" if usable.skipped else "?"
    if not usable.rows:
        raise UserError(f"{root}: none of {len(files.candidates)} audio files is usable; the first, {first}")
    speakers = sorted({row.of.speaker for row in usable.rows})
    if len(speakers) < 2:
        skipped = f" ({len(usable.skipped)} of the files cannot be used: {first})" if usable.skipped else ""
        raise UserError(
            f"{root} holds one speaker, {speakers[0]!r}{skipped}; conversion needs at least two; {EXPECTED_LAYOUT}"
        )
    split_of, notes = _assign_splits([row.of for row in usable.rows], *split)
    folder = root if root.is_dir() else root.parent
    rows: dict[str, list[_Row]] = {name: [] for name in SPLITS}
    for row in usable.rows:
        given = row.of.split
        rows[given if given in ("dev", "test") else split_of.get(row.of.speaker, "train")].append(row)
    splits = {
        name: Utterances.of((row.utterance() for row in sorted(of, key=lambda row: row.id)), folder)
        for name, of in rows.items()
    }
    corpus = Corpus(
        root=folder,
        name=folder.resolve().name if root.is_dir() or root.name == MANIFEST_NAME else root.stem,
        splits=splits,
        skipped=tuple(usable.skipped),
        notes=(*files.notes, *usable.notes(), *notes, *_single_utterance_notes(splits)),
    )
    return corpus, files.reasons, paths


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


class _Segments(Rows[FileSegment]):
    """What is checked of each candidate."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates

    def __len__(self) -> int:
        return len(self.candidates)

    def at(self, row: int) -> FileSegment:
        candidate = self.candidates[row]
        return candidate.path, candidate.start, candidate.seconds


@dataclass(frozen=True, slots=True)
class _Row:
    """A usable candidate: what becomes an utterance."""

    id: str
    of: Candidate
    start: float
    seconds: float
    sample_rate: int
    level: float
    digest: str
    text: str | None

    def utterance(self) -> Utterance:
        return Utterance(
            self.id, Path(self.of.path), self.of.speaker, self.seconds, self.sample_rate, self.start, self.text,
            self.of.sex, self.digest, self.level,
        )  # fmt: skip


class _Usable:
    """The candidates that are usable, and why the others are not.

    Attributes:
        rows: what becomes utterances.
        skipped: (path, reason).
        cut: number of long files that were cut into pieces.
    """

    def __init__(self, files: CorpusFiles) -> None:
        self.files = files
        self.rows: list[_Row] = []
        self.skipped = list(files.skipped)
        self.cut = self.pieces = 0
        self._ids: set[str] = set()
        self._first: dict[str, _Row] = {}  # by digest
        self._others: dict[str, list[_Row]] = {}

    def add(self, checks: Iterator[AudioCheck]) -> None:
        """Add each candidate by its check."""
        for c, check in zip(self.files.candidates, checks, strict=True):
            reason = check.problem
            if not reason and c.digest and c.digest != check.digest:
                reason = "is not the file of the manifest: its bytes have changed"
            if reason:
                self.skipped.append((Path(c.path), reason))
                continue
            if c.id in self._ids:  # a.wav next to a.flac
                c = replace(c, id=c.id + os.path.splitext(c.path)[1])
            self._ids.add(c.id)
            row = _Row(c.id, c, c.start, check.seconds, check.sample_rate, check.level, check.digest, c.text)
            if reason := self._duplicate(row):
                self.skipped.append((Path(c.path), reason))
                continue
            self.cut += bool(check.pieces)
            self.pieces += len(check.pieces)
            self.rows += [
                replace(row, id=f"{c.id}@{p.start:07.2f}", start=p.start, seconds=p.seconds, level=p.level, text=None)
                for p in check.pieces
            ] or [row]

    def _duplicate(self, row: _Row) -> str:
        """Why a row duplicates an earlier one (of a file with the same bytes), which would leak between splits or
        references; "" if it does not."""
        first = self._first.setdefault(row.digest, row)
        if first is row:
            return ""
        others = self._others.setdefault(row.digest, [])
        for other in (first, *others):
            if row.start < other.start + other.seconds and other.start < row.start + row.seconds:
                return (
                    f"is the same audio as {other.of.path}"
                    if row.of.path != other.of.path
                    else f"overlaps {other.id!r}"
                )
        others.append(row)
        return ""

    def notes(self) -> list[str]:
        """What was done with long files."""
        if not self.cut:
            return []
        return [f"{self.cut} files of more than {LONG_SECONDS:.0f} s were cut at pauses into {self.pieces} utterances"]


def _assign_splits(usable: list[Candidate], seed: int, dev: float, test: float) -> tuple[dict[str, str], list[str]]:
    """Speaker -> split, of those that the data does not assign, and notes. If the data has a train split but no dev or
    test, they are taken from train."""
    given = {c.split for c in usable if c.split}
    if given and ("train" not in given or given == set(SPLITS)):
        return {}, []
    shares = {split: 0.0 if split in given else share for split, share in (("dev", dev), ("test", test))}
    movable = {c.speaker for c in usable if c.split in (None, "train")}
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
    return assigned, notes


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
