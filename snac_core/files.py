"""Atomic writing of files, and digests of tensors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snac_core.errors import UserError

_UNFINISHED = "unfinished-"  # in names of temporary files


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, remove it on any error.

    An existing file at `path` is kept until the rename, also if the disk is full. The folder is created if missing.

    Raises:
        UserError: if `path` exists and is not a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} exists and is not a regular file; expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.{_UNFINISHED}", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def printable(path: str | Path) -> str:
    """A path for messages; bytes of it that are not UTF-8 are shown as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def name_problem(path: str | Path) -> str:
    """Why audio of this name cannot be used, as a predicate: libsndfile and JSON need UTF-8. "" if it can be used."""
    try:
        str(path).encode()
        return ""
    except UnicodeEncodeError:
        return "has a name, or a folder's name, that is not UTF-8: rename it"


def check_names(paths: Iterable[Path], what: str) -> None:
    """Raise UserError for the first name of which `name_problem` has a problem; `what` says what the files are."""
    for path in paths:
        if problem := name_problem(path):
            raise UserError(f"{what} {printable(path)} {problem}")


def remove_unfinished(folder: str | Path) -> None:
    """Remove the temporary files that killed processes left at any depth of a folder, which nobody else writes into."""
    for path in Path(folder).rglob(f".*.{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN raises ValueError: JSON has no such number."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is not JSON, or is nested deeper than Python's stack (json.loads raises RecursionError then).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def tensor_digest(tensors: Iterable[tuple[str, Tensor]], preamble: str = "") -> str:
    """sha256 (hex) over `preamble`, then the name, dtype, shape and bytes of each tensor, in the given order."""
    digest = hashlib.sha256(preamble.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
