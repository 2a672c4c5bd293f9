"""The exception for mistakes of the user, and suggestions for its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can fix.

    The message states what was given, what is expected, and the nearest valid value.

    The command line prints it as one line and exits with code 2.
    """


def system_error(error: OSError) -> str:
    """An error of the system as a sentence: a full disk, a folder without permission."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the name in `known` that is closest to `name`, else all of `known`."""
    known = sorted(known)
    if not known:
        return "; none is known"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [k for k in known if name and name in k][:1]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
