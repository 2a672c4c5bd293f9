"""Open a corpus: find its files, check them, and assign speakers to splits; and write it down as a manifest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from snac_core.errors import UserError
from snac_runner.data.audio import AudioCheck, FileSegment, check_audio_files
from snac_runner.data.corpus import DEV_SHARE, MIN_SPEAKERS, SPLITS, TEST_SHARE, Corpus, Utterance, split_speakers
from snac_runner.data.formats import (
    EXPECTED_LAYOUT,
    MANIFEST_NAME,
    Candidate,
    CorpusFiles,
    find_files,
    read_manifest,
    write_manifest,
)

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

    Args:
        path: a folder of speakers, one split into train/, dev/ and test/, a LibriSpeech, LibriTTS or VCTK folder, or a
            manifest (.jsonl). If the folder has a manifest.jsonl, only the manifest is read.
        seed: of the split by speaker, if the data is not split already.
        dev: fraction of the speakers for dev, if the data is not split already.
        test: fraction of the speakers for test, likewise.
        warn: called with a message for each file that is skipped; the default logs it.
        progress: called with (done, total) while files are decoded for the first time.

    Raises:
        UserError: if there is no usable audio, only one speaker, or a speaker in two splits.
    """
    root = Path(path)
    files = _corpus_files(root)
    checks = check_audio_files([_file_segment(c) for c in files.candidates], root, progress)
    usable, skipped = _usable(files, checks)
    for file, reason in skipped:
        warn(f"skipped {file}: {reason}")
    if not usable:
        first = f"{skipped[0][0]}, {skipped[0][1]}" if skipped else "?"
        raise UserError(f"{root}: none of {len(files.candidates)} audio files is usable; the first, {first}")
    speakers = sorted({c.speaker for c, _ in usable})
    if len(speakers) < 2:
        raise UserError(f"{root} holds one speaker, {speakers[0]!r}; conversion needs at least two; {EXPECTED_LAYOUT}")
    split_of, notes = _assign_splits([c for c, _ in usable], seed, dev, test)
    splits: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    for c, check in usable:
        splits[split_of[c.id]].append(
            Utterance(c.id, c.path, c.speaker, check.seconds, check.sample_rate, c.start, c.text, c.sex, check.digest)
        )
    sorted_splits = {split: tuple(sorted(us, key=lambda u: u.id)) for split, us in splits.items()}
    folder = root if root.is_dir() else root.parent
    return Corpus(
        root=folder,
        name=folder.resolve().name if root.is_dir() or root.name == MANIFEST_NAME else root.stem,
        splits=sorted_splits,
        skipped=tuple(skipped),
        notes=(*files.notes, *notes, *_single_utterance_notes(sorted_splits)),
    )


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


def _corpus_files(root: Path) -> CorpusFiles:
    if not root.exists():
        raise UserError(f"no folder {root}; {EXPECTED_LAYOUT}")
    if root.is_dir():
        if (root / MANIFEST_NAME).is_file():
            return CorpusFiles(read_manifest(root / MANIFEST_NAME))
        try:
            return find_files(root)
        except PermissionError as error:
            raise UserError(f"no permission to read {error.filename}") from None
    if root.suffix.lower() != ".jsonl":
        raise UserError(f"{root} is a file, not a folder; {EXPECTED_LAYOUT}")
    return CorpusFiles(read_manifest(root))


def _file_segment(c: Candidate) -> FileSegment:
    return c.path, c.start, c.seconds


def _usable(
    files: CorpusFiles, checks: dict[FileSegment, AudioCheck]
) -> tuple[list[tuple[Candidate, AudioCheck]], list[tuple[Path, str]]]:
    """The usable candidates with their checks, and (path, reason) of all that is skipped."""
    usable: list[tuple[Candidate, AudioCheck]] = []
    skipped = list(files.skipped)
    same_digest: dict[str, list[Candidate]] = {}
    ids: set[str] = set()
    for c in files.candidates:
        check = checks[_file_segment(c)]
        reason = check.problem
        if not reason and c.digest and c.digest != check.digest:
            reason = "is not the file of the manifest: its bytes have changed"
        if not reason:
            reason = _duplicate(c, check, same_digest.setdefault(check.digest, []))
        if reason:
            skipped.append((c.path, reason))
            continue
        if c.id in ids:  # a.wav next to a.flac
            c = replace(c, id=c.id + c.path.suffix)
        ids.add(c.id)
        same_digest[check.digest].append(replace(c, seconds=check.seconds))
        usable.append((c, check))
    return usable, skipped


def _duplicate(c: Candidate, check: AudioCheck, others: list[Candidate]) -> str:
    """Why a candidate duplicates one of `others` (files with the same bytes), which would leak between splits or
    references; "" if it does not."""
    for other in others:
        assert other.seconds is not None
        if c.start < other.start + other.seconds and other.start < c.start + check.seconds:
            return f"is the same audio as {other.path}" if c.path != other.path else f"overlaps {other.id!r}"
    return ""


def _assign_splits(usable: list[Candidate], seed: int, dev: float, test: float) -> tuple[dict[str, str], list[str]]:
    """Utterance id -> split, and notes. If the data has a train split but no dev or test, they are taken from train."""
    given = {c.split for c in usable if c.split}
    split_of = {c.id: c.split for c in usable if c.split}
    if given and ("train" not in given or given == set(SPLITS)):
        return split_of, []
    movable = [c for c in usable if c.split in (None, "train")]
    shares = {split: 0.0 if split in given else share for split, share in (("dev", dev), ("test", test))}
    assigned = split_speakers((c.speaker for c in movable), seed=seed, **shares)
    split_of |= {c.id: assigned[c.speaker] for c in movable}
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
    return split_of, notes


def _single_utterance_notes(splits: dict[str, tuple[Utterance, ...]]) -> list[str]:
    """A note for each split that has speakers with only one utterance."""
    notes = []
    for split, utterances in splits.items():
        counts = Counter(u.speaker for u in utterances)
        single = sum(1 for n in counts.values() if n == 1)
        if single:
            notes.append(
                f"{split}: {single} of {len(counts)} speakers have one utterance; "
                "their conditioning and scoring references are non-overlapping halves of it"
            )
    return notes
