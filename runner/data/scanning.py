"""Check a folder of speech once and write down what is in it: a manifest with a speaker-disjoint split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runner.data.corpus import Corpus
from runner.data.manifest import NAME, write_manifest
from runner.data.opening import open_corpus
from runner.data.splits import DEV_SHARE, TEST_SHARE
from snac_core.errors import UserError


def scan(
    path: str | Path,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    dev: float = DEV_SHARE,
    test: float = TEST_SHARE,
    console: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Open a corpus and write its manifest, which then stands for it: the split no longer changes when files come.

    Args:
        path: as for open_corpus; so are seed, dev, test, console and progress.
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
    corpus = open_corpus(path, seed=seed, dev=dev, test=test, console=console, progress=progress)
    try:
        write_manifest(place, corpus.splits)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}; name a place that can be written") from None
    return corpus
