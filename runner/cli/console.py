"""What long work shows: one progress bar with the time left, and lines above it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.study import Console


class Stopped(Exception):
    """Ctrl-C, with how to go on. (No KeyboardInterrupt: typer would swallow it, text and all.)"""


@contextmanager
def progress() -> Iterator[Console]:
    """A console for the time of some work. Where the output is no terminal, a line every tenth of the work."""
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from runner.study import Console

    terminal = Terminal(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    live = terminal.is_terminal
    with Progress(*columns, console=terminal, disable=not live, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def line(text: str) -> None:
            terminal.print(text, soft_wrap=True, markup=False)

        def step(title: str, done: int, of: int, note: str) -> None:
            if not live:
                if done == of or (of >= 10 and done % (of // 10) == 0):
                    line(f"{title}: {done}/{of} {note}".rstrip())
                return
            if title not in tasks:
                for other in tasks.values():
                    bar.update(other, visible=False)
                tasks[title] = bar.add_task(title, total=of, note=note)
            bar.update(tasks[title], completed=done, note=note, visible=done < of)

        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_kw: line(f"warning: {message}")
            yield Console(line, step)


def say(text: str) -> None:
    """Print a line of a command's answer."""
    print(text, file=sys.stdout)
