"""Embeddings of a corpus on disk: written once, memory-mapped, and read only where needed.

A bank is a folder of numpy arrays that are named by their content, and a `bank.json` that lists them. The arrays are
written first, and the header is renamed into place last: a reader sees the old bank or the new one, also during a
write. Rows are utterances, grouped by split and sorted by id.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from snac_core.conditioning import EncoderIdentity
from snac_core.errors import UserError
from snac_core.files import parse_json, write_json, writing
from snac_core.speakers.encoder import SpeakerEncoder

HEADER = "bank.json"
FORMAT = 1
ARRAYS: dict[str, tuple[Any, int]] = {
    "embeddings": (np.float32, 2),  # (N, S) unit norm, an utterance each
    "labels": (np.int32, 1),  # (N,) row of the utterance's speaker
    "keys": (np.uint8, 2),  # (N, 32) sha256 of the embedded audio
    "conditioning": (np.float32, 2),  # (P, S) unit norm; for conditioning
    "reference": (np.float32, 2),  # (P, S) unit norm; for comparison with outputs
    "speaker_keys": (np.uint8, 2),  # (P, 32) sha256 of the audio of both
}
TEXTS = ("utterances", "speakers")  # ids (N) and names (P), a JSON string a line

_TRIES = 6  # to open a bank that is being replaced


@dataclass(frozen=True)
class BankHeader:
    """Content of a bank.

    Attributes:
        encoder: name of the speaker encoder.
        encoder_digest: of its weights and computation.
        dim: S.
        audio: digest over the keys of all utterances.
        splits: split to (first, past the last) row of its utterances.
        speaker_splits: split to (first, past the last) row of its speakers.
        files: array or text to (file name, sha256, bytes).
    """

    encoder: str
    encoder_digest: str
    dim: int
    audio: str
    splits: dict[str, tuple[int, int]]
    speaker_splits: dict[str, tuple[int, int]]
    files: dict[str, tuple[str, str, int]]


class Bank:
    """An open bank. Its arrays are memory-mapped: only rows that are read use memory.

    Attributes:
        folder: of its files.
        header: its content.
        embeddings, labels, keys, conditioning, reference, speaker_keys: see `ARRAYS`.
    """

    embeddings: NDArray[np.float32]
    labels: NDArray[np.int32]
    keys: NDArray[np.uint8]
    conditioning: NDArray[np.float32]
    reference: NDArray[np.float32]
    speaker_keys: NDArray[np.uint8]

    def __init__(self, folder: Path, header: BankHeader) -> None:
        self.folder = folder
        self.header = header
        for name, (kind, axes) in ARRAYS.items():
            setattr(self, name, _mapped(folder / header.files[name][0], kind, axes))
        lengths = {len(self.embeddings), len(self.labels), len(self.keys)}
        if len(lengths) > 1 or self.embeddings.shape[1:] != (header.dim,):
            raise UserError(f"{folder} is damaged: its arrays do not fit each other; rebuild it")

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def ids(self) -> list[str]:
        """The utterances' ids, by row."""
        return self._lines("utterances")

    @cached_property
    def names(self) -> list[str]:
        """The speakers' names, by label."""
        return self._lines("speakers")

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(size for _, _, size in self.header.files.values())

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Rows (K,) of the utterances with these keys (K, 32); -1 for unknown keys."""
        return find_rows(self.keys, keys)

    def find_speakers(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Rows (K,) of the speakers with these keys (K, 32); -1 for unknown keys."""
        return find_rows(self.speaker_keys, keys)

    def verify(self) -> None:
        """Compare the digests of all files with the header; UserError if a file has changed."""
        for name, (file, digest, _) in self.header.files.items():
            if _sha256(self.folder / file) != digest:
                raise UserError(f"{self.folder / file} is damaged ({name}): its bytes have changed; rebuild it")

    def _lines(self, name: str) -> list[str]:
        text = (self.folder / self.header.files[name][0]).read_bytes().decode()
        return [parse_json(line) for line in text.split("\n")[:-1]]


def open_bank(folder: str | Path, *, encoder: SpeakerEncoder | None = None) -> Bank:
    """Open a bank, without reading its arrays.

    Args:
        folder: of its files.
        encoder: the required speaker encoder.

    Raises:
        UserError: if there is no bank, it is truncated, or it has another encoder.
    """
    folder = Path(folder)
    for attempt in range(_TRIES):  # a build may replace the files after the header is read
        try:
            header = _read_header(folder)
            _check_sizes(folder, header)
            bank = Bank(folder, header)
            break
        except UserError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.01 * attempt)
    if encoder is not None and encoder.digest != header.encoder_digest:
        raise UserError(
            f"{folder} is a bank of speaker encoder {header.encoder!r} (digest {header.encoder_digest[:12]}); expected "
            f"{encoder.name!r} (digest {encoder.digest[:12]}): build one with `runner index build --encoder "
            f"{encoder.name}`"
        )
    return bank


def write_bank(
    folder: str | Path,
    *,
    encoder: EncoderIdentity,
    arrays: dict[str, NDArray[Any]],
    ids: Sequence[str],
    names: Sequence[str],
    splits: dict[str, tuple[int, int]],
    speaker_splits: dict[str, tuple[int, int]],
) -> Bank:
    """Write or replace a bank; the same content gives the same bytes.

    Args:
        folder: created if missing.
        encoder: the speaker encoder of the embeddings; with a digest.
        arrays: by name, see `ARRAYS`.
        ids: of the utterances (N).
        names: of the speakers (P).
        splits, speaker_splits: see `BankHeader`.

    Raises:
        UserError: names the first embedding with NaN or infinity.
    """
    folder = Path(folder)
    for name, of in (("embeddings", ids), ("conditioning", names), ("reference", names)):
        check_finite(arrays[name], of, encoder.name)
    files = {
        name: _store(folder, name, ".npy", np.ascontiguousarray(arrays[name], dtype=kind))
        for name, (kind, _) in ARRAYS.items()
    }
    for name, lines in zip(TEXTS, (ids, names), strict=True):
        texts = (json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        files[name] = _store(folder, name, ".jsonl", texts)
    audio = audio_digest(arrays["keys"], arrays["labels"])
    assert encoder.digest is not None
    header = BankHeader(encoder.name, encoder.digest, encoder.dim, audio, splits, speaker_splits, files)
    write_json(folder / HEADER, {"format": FORMAT, **vars(header)})
    _clear(folder, {file for file, _, _ in files.values()})
    return open_bank(folder)


def _clear(folder: Path, kept: set[str]) -> None:
    """Remove the arrays of an older bank, and temporary files of an interrupted write."""
    for path in folder.iterdir():
        begun = path.name.lstrip(".").split(".")[0].partition("-")[0]
        if path.is_file() and path.name not in {*kept, HEADER} and begun in {*ARRAYS, *TEXTS, "bank"}:
            path.unlink(missing_ok=True)


def audio_digest(keys: NDArray[np.uint8], labels: NDArray[Any]) -> str:
    """sha256 (hex) over the keys (N, 32) and labels (N,) of utterances."""
    digest = hashlib.sha256(np.ascontiguousarray(keys).tobytes())
    digest.update(np.ascontiguousarray(labels, dtype=np.int32).tobytes())
    return digest.hexdigest()


def check_finite(embeddings: NDArray[np.float32], of: Sequence[str], encoder: str) -> None:
    """Raise UserError with the name of the first of the embeddings (N, S) that has NaN or infinity."""
    for first in range(0, len(embeddings), 65536):
        bad = ~np.isfinite(embeddings[first : first + 65536]).all(axis=1)
        if bad.any():
            name = of[first + int(bad.argmax())]
            raise UserError(f"speaker encoder {encoder!r} gives NaN or infinite values for {name!r}; leave it out")


def _store(folder: Path, name: str, suffix: str, content: NDArray[Any] | Iterable[bytes]) -> tuple[str, str, int]:
    """Write one file, named by its digest; returns (file name, sha256, bytes)."""
    whole = folder / f"{name}{suffix}"
    with writing(whole) as temporary:
        if isinstance(content, np.ndarray):
            try:
                np.save(temporary, content)
            except OSError as error:  # numpy's has only a text: bytes that were not written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(whole)) from error
        else:
            with temporary.open("wb") as opened:
                opened.writelines(content)
    digest = _sha256(whole)
    file = f"{name}-{digest[:16]}{suffix}"
    whole.replace(folder / file)
    return file, digest, (folder / file).stat().st_size


def _read_header(folder: Path) -> BankHeader:
    path = folder / HEADER
    try:
        stored = parse_json(path.read_text())
        if stored.pop("format") != FORMAT:
            raise UserError(f"{path} is of another version of this format; rebuild it")
        return TypeAdapter(BankHeader).validate_python(stored)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no bank at {folder}: it has no {HEADER}; make one with `runner index build`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a header of a bank; rebuild it with `runner index build`") from error


def _check_sizes(folder: Path, header: BankHeader) -> None:
    for name in (*ARRAYS, *TEXTS):
        if name not in header.files:
            raise UserError(f"{folder / HEADER} does not list {name}; rebuild it with `runner index build`")
        file, _, size = header.files[name]
        try:
            there = (folder / file).stat().st_size
        except OSError:
            there = None
        if there != size:
            got = "is missing" if there is None else f"is truncated: {there} of {size} bytes"
            raise UserError(f"{folder / file} {got}; rebuild it with `runner index build`")


def _mapped(path: Path, kind: Any, axes: int) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; rebuild it") from error
    if values.dtype != kind or values.ndim != axes:
        raise UserError(f"{path} holds {values.dtype} with {values.ndim} axes; expected {np.dtype(kind)} with {axes}")
    return values


def find_rows(among: NDArray[np.uint8], keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Rows (K,) of `keys` (K, 32) in `among` (N, 32), the first of equal ones; -1 for keys that are not there."""
    if not len(among) or not len(keys):
        return np.full(len(keys), -1, dtype=np.int64)
    stored, wanted = (np.ascontiguousarray(k).view("V32").ravel().view("S32") for k in (among, keys))
    order = np.argsort(stored, kind="stable")
    place = np.minimum(np.searchsorted(stored, wanted, sorter=order), len(stored) - 1)
    rows: NDArray[np.int64] = order[place]
    return np.where((among[rows] == keys).all(axis=1), rows, -1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
