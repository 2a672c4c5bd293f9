"""Manifests: one JSON object a line, one line an utterance.

`path` (relative to the manifest) and `speaker` are needed. `id`, `split`, `text`, `sex`, `start` and `seconds` (s) and
`digest` (sha256 of the file) may be given. Either every line has a split or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.data.corpus import SPLITS, Utterance
from runner.data.layouts import Candidate
from snac_core import atomic
from snac_core.errors import UserError, nearest

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
    candidates = [_candidate(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
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


def _candidate(line: str, path: Path, number: int) -> Candidate:
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
    atomic.write_text(path, "\n".join(lines) + "\n")
