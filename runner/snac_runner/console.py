"""Where long work reports: lines of text, and how far it is.

The package calls a `Console` and does not know how it is displayed. The command line displays it with rich
(`snac_runner.cli.console.terminal`); `SILENT`, the default of functions that take a console, displays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol


class Progress(Protocol):
    """Called with the number of parts done, the number of parts in all, and optionally a short text."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


class Console:
    """Displays nothing; a subclass overrides `line` and `show_progress`."""

    def line(self, text: str) -> None:
        """Display a line of text."""

    def show_progress(self, title: str, done: int, total: int, note: str = "") -> None:
        """Display that `done` of `total` parts of the work called `title` are done."""

    def warning(self, text: str) -> None:
        """Display a line of text as a warning."""
        self.line(f"warning: {text}")

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Inside the block, several works report their progress by turns."""
        yield

    def progress(self, title: str) -> Progress:
        """What to call with (done, total) while the work called `title` runs."""
        return partial(self.show_progress, title)


SILENT = Console()
