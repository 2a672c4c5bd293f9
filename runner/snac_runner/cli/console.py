"""What long work shows: one progress bar with the time left, and lines above it.

The options of every command that loads plugins, and the plugins they name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from snac_core.plugins import Catalogue
    from snac_runner.controls import Console


class Stopped(Exception):
    """Ctrl-C, with how to go on. (No KeyboardInterrupt: typer would swallow it, text and all.)"""


@contextmanager
def progress() -> Iterator[Console]:
    """A console for the time of some work. Where the output is no terminal, a line every tenth of the work."""
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from snac_runner.controls import Console

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


Plugin = Annotated[list[str], typer.Option("--plugin", help="Python file with a plugin; may be repeated.")]
Disable = Annotated[list[str], typer.Option("--disable-plugin", help="Installed plugin to leave out; may be repeated.")]


def catalogue_of(files: Iterable[str], disable: Iterable[str], line: Callable[[str], None] | None = None) -> Catalogue:
    """The installed plugins without `disable`, and the `files`; what is wrong with one goes to `line`, else stderr."""
    from snac_core.plugins import discover

    catalogue = discover(files, disable=disable)
    for warning in catalogue.warnings:
        text = f"warning: {warning}"
        line(text) if line else print(text, file=sys.stderr)
    return catalogue
