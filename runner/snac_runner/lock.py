"""Locks of folders, so that two commands do not write into the same one at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from snac_core.errors import UserError


@contextmanager
def locked(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder, which is created if missing; the lock ends with the process, even if it is killed.

    If the block raises an error, neither a lock file nor an empty folder is left that was not there before.

    Args:
        folder: of which there is one user at a time.
        what: what another user does with it, for the message, e.g. "is building the bank".
        wait: wait for another user to finish, instead of the error.

    Raises:
        UserError: if another process has locked it, unless `wait`.
    """
    file = folder / ".lock"
    new = [path for path in (file, folder) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file, timeout=-1 if wait else 0):
            try:
                yield
            except UserError:
                with suppress(OSError):  # the folder is not empty
                    for path in new:
                        path.rmdir() if path == folder else path.unlink()
                raise
    except Timeout:
        raise UserError(f"another command {what} {folder}; wait for it, or give another --out") from None
