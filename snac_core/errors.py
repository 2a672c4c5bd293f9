"""The one exception for mistakes of the user, and the nearest right answer to put into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that its maker can mend: the message names what was got, what was expected, and the nearest answer.

    The command line prints it as one line and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest of `known` to `name`, else all of `known`."""
    known = sorted(known)
    if not known:
        return "; none is known here"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [k for k in known if name and name in k][:1]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
