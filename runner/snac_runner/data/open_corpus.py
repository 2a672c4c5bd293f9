"""Check a folder of speech once and write down what is in it: a manifest with a speaker-disjoint split.

From a path to a corpus: find the files, listen to each once, name what is unusable, split by speaker."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from snac_core.errors import UserError
from snac_runner.data.audio import Content, examine_all
from snac_runner.data.corpus import DEV_SHARE, LEAST, SPLITS, TEST_SHARE, Corpus, Utterance, split_speakers
from snac_runner.data.formats import EXPECTED, NAME, Candidate, Found, find, read_manifest, write_manifest


def scan(
    path: str | Path,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    dev: float = DEV_SHARE,
    test: float = TEST_SHARE,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Open a corpus and write its manifest, which then stands for it: the split no longer changes when files come.

    Args:
        path: as for open_corpus; so are seed, dev, test, warn and progress.
        out: the manifest to write; None: manifest.jsonl in the folder.

    Returns:
        The corpus that was written down.

    Raises:
        UserError: as open_corpus does; if the manifest is there already, or cannot be written.
    """
    path = Path(path)
    place = Path(out) if out is not None else (path if path.is_dir() else path.parent) / NAME
    if place.is_dir():
        place = place / NAME
    if place.suffix.lower() != ".jsonl":
        raise UserError(f"a manifest is a .jsonl file; {place} is not named like one")
    if place.exists():
        raise UserError(f"{place} is there already and fixes the split; remove it, or write another one")
    corpus = open_corpus(path, seed=seed, dev=dev, test=test, warn=warn, progress=progress)
    try:
        write_manifest(place, corpus.splits)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}; name a place that can be written") from None
    return corpus


_log = logging.getLogger(__name__)


def open_corpus(
    path: str | Path,
    *,
    seed: int = 0,
    dev: float = DEV_SHARE,
    test: float = TEST_SHARE,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """The corpus at `path`.

    Args:
        path: a folder of speakers, one split into train/, dev/ and test/, a LibriSpeech, LibriTTS or VCTK folder, or a
            manifest (.jsonl). A folder with a manifest.jsonl is what that manifest says.
        seed: of the split by speaker, where the data is not split already.
        dev: share of the speakers for dev, where the data is not split already.
        test: share of the speakers for test, likewise.
        warn: called with a line for each file that is skipped; None: they are logged as warnings.
        progress: called with (done, of how many) while files are decoded for the first time.

    Raises:
        UserError: if nothing usable is there, or only one speaker, or a speaker is in two splits.
    """
    root = Path(path)
    found = _found(root)
    stretches = [(c.path, c.start, c.seconds) for c in found.candidates]
    contents = examine_all(stretches, root, progress)
    usable, skipped = _usable(found, contents)
    for bad, reason in skipped:
        (warn or _log.warning)(f"skipped {bad}: {reason}")
    folder = root if root.is_dir() else root.parent
    if not usable:
        raise UserError(f"{root}: none of {len(found.candidates)} audio files is usable; the first, {_first(skipped)}")
    speakers = sorted({c.speaker for c, _ in usable})
    if len(speakers) < 2:
        raise UserError(f"{root} holds one speaker, {speakers[0]!r}; conversion needs at least two; {EXPECTED}")
    homes, notes = _homes([c for c, _ in usable], seed, dev, test)
    splits: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    for c, content in usable:
        splits[homes[c.id]].append(_utterance(c, content))
    parts = {split: tuple(sorted(us, key=lambda u: u.id)) for split, us in splits.items()}
    return Corpus(
        root=folder,
        name=folder.resolve().name if root.is_dir() or root.name == NAME else root.stem,
        splits=parts,
        skipped=tuple(skipped),
        notes=(*found.notes, *notes, *_single(parts)),
    )


def _found(root: Path) -> Found:
    if not root.exists():
        raise UserError(f"no folder {root}; {EXPECTED}")
    if root.is_dir():
        if (root / NAME).is_file():
            return Found(read_manifest(root / NAME), [], [])
        try:
            return find(root)
        except PermissionError as error:
            raise UserError(f"{error.filename} may not be read") from None
    if root.suffix.lower() != ".jsonl":
        raise UserError(f"{root} is a file, not a folder; {EXPECTED}")
    return Found(read_manifest(root), [], [])


def _usable(
    found: Found, contents: dict[tuple[Path, float, float | None], Content]
) -> tuple[list[tuple[Candidate, Content]], list[tuple[Path, str]]]:
    """Candidates that can be used with their contents, and what is skipped with the reason for each."""
    usable: list[tuple[Candidate, Content]] = []
    skipped = list(found.skipped)
    heard: dict[str, list[Candidate]] = {}
    ids: set[str] = set()
    for c in found.candidates:
        content = contents[(c.path, c.start, c.seconds)]
        reason = content.problem
        if not reason and c.digest and c.digest != content.digest:
            reason = "is not the file of the manifest: its bytes have changed"
        if not reason:
            reason = _again(c, content, heard.setdefault(content.digest, []))
        if reason:
            skipped.append((c.path, reason))
            continue
        if c.id in ids:  # a.wav beside a.flac
            c = replace(c, id=c.id + c.path.suffix)
        ids.add(c.id)
        heard[content.digest].append(replace(c, seconds=content.seconds))
        usable.append((c, content))
    return usable, skipped


def _again(c: Candidate, content: Content, before: list[Candidate]) -> str:
    """Whether these very samples were there already: a copy would leak between splits, or between references."""
    for other in before:
        assert other.seconds is not None
        if c.start < other.start + other.seconds and other.start < c.start + content.seconds:
            return f"is the same audio as {other.path}" if c.path != other.path else f"overlaps {other.id!r}"
    return ""


def _homes(usable: list[Candidate], seed: int, dev: float, test: float) -> tuple[dict[str, str], list[str]]:
    """Utterance id -> split, and remarks. Data that has training speakers but no dev or test gives some of them up."""
    given = {c.split for c in usable if c.split}
    homes = {c.id: c.split for c in usable if c.split}
    notes: list[str] = []
    if given and ("train" not in given or given == set(SPLITS)):
        return homes, notes
    open_to_choice = [c for c in usable if c.split in (None, "train")]
    shares = {split: 0.0 if split in given else share for split, share in (("dev", dev), ("test", test))}
    chosen = split_speakers((c.speaker for c in open_to_choice), seed=seed, **shares)
    homes |= {c.id: chosen[c.speaker] for c in open_to_choice}
    missing = " and ".join(split for split, share in shares.items() if share > 0)
    if given and missing:
        notes.append(f"no {missing} part here: taken from the training speakers by a hash of the name (seed {seed})")
    counts = Counter(chosen.values())
    notes += [
        f"{split} is empty: {len(chosen)} speakers are too few to keep {LEAST} apart for it"
        for split, share in shares.items()
        if share > 0 and not counts[split]
    ]
    return homes, notes


def _utterance(c: Candidate, content: Content) -> Utterance:
    return Utterance(
        id=c.id,
        path=c.path,
        speaker=c.speaker,
        seconds=content.seconds,
        sample_rate=content.sample_rate,
        start=c.start,
        text=c.text,
        sex=c.sex,
        digest=content.digest,
    )


def _single(parts: dict[str, tuple[Utterance, ...]]) -> list[str]:
    """A remark for each split in which speakers have one utterance only."""
    notes = []
    for split, utterances in parts.items():
        counts = Counter(u.speaker for u in utterances)
        single = sum(1 for n in counts.values() if n == 1)
        if single:
            notes.append(
                f"{split}: {single} of {len(counts)} speakers have one utterance; "
                "their conditioning and scoring references are non-overlapping halves of it"
            )
    return notes


def _first(skipped: list[tuple[Path, str]]) -> str:
    return f"{skipped[0][0]}, {skipped[0][1]}" if skipped else "?"
