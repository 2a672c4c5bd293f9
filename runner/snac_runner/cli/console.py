"""What commands share: the console on the terminal, and the options that load plugins."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from snac_runner.console import SILENT, Console

if TYPE_CHECKING:
    import rich.console
    import rich.progress

    from snac_core.plugins import Catalogue


class Stopped(Exception):
    """Ctrl-C, with the command that continues. Not a KeyboardInterrupt: typer discards the text of those."""


class TerminalConsole(Console):
    """One progress bar with the time left, and lines above it; without a terminal, a line every tenth of the work.

    Works side by side have a bar each.

    Args:
        output: where to print.
        bar: rich's progress bar on that output.
    """

    def __init__(self, output: rich.console.Console, bar: rich.progress.Progress) -> None:
        self.output = output
        self.bar = bar
        self.tasks: dict[str, rich.progress.TaskID] = {}
        self.several = False

    def line(self, text: str) -> None:
        self.output.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        self.several = True
        try:
            yield
        finally:
            self.several = False

    def show_progress(self, title: str, done: int, total: int, note: str = "") -> None:
        if not self.output.is_terminal:
            if done == total or (total >= 10 and done % (total // 10) == 0):
                self.line(f"{title}: {done}/{total} {note}".rstrip())
            return
        if title not in self.tasks:
            for other in () if self.several else self.tasks.values():
                self.bar.update(other, visible=False)
            self.tasks[title] = self.bar.add_task(title, total=total, note=note)
        self.bar.update(self.tasks[title], completed=done, note=note, visible=done < total)


@contextmanager
def terminal() -> Iterator[Console]:
    """A console on stderr for the time of some work; Python's warnings appear as lines of it.

    Of several processes, the first has it; the others are silent.
    """
    if not is_first():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield SILENT
        return
    from rich.console import Console as Output
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    output = Output(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=output, disable=not output.is_terminal, transient=True) as bar:
        console = TerminalConsole(output, bar)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_kw: console.warning(str(message))
            yield console


def say(text: str) -> None:
    """Print a line of a command's answer; of several processes, the first prints it."""
    if is_first():
        print(text, file=sys.stdout)


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


Judge = Annotated[
    str | None,
    typer.Option(
        help="Speaker encoders for evaluation, separated by commas; NAME:FILE gives the weights.", show_default=False
    ),
]
WhisperName = Annotated[
    str | None, typer.Option("--whisper", help="Whisper for word errors: a folder or a name.", show_default=False)
]
Language = Annotated[
    str | None, typer.Option(help="Language of the speech, as a code such as en or de.", show_default=False)
]
Plugin = Annotated[list[str], typer.Option("--plugin", help="Python file with a plugin; may be repeated.")]
Disable = Annotated[list[str], typer.Option("--disable-plugin", help="Installed plugin to leave out; may be repeated.")]


def names_in(text: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",")]


def catalogue_of(files: Iterable[str], disable: Iterable[str], console: Console | None = None) -> Catalogue:
    """The installed plugins without `disable`, and the `files`; warnings go to the console, else to stderr."""
    from snac_core.plugins import discover

    catalogue = discover(files, disable=disable)
    for warning in catalogue.warnings:
        if console:
            console.warning(warning)
        else:
            print(f"warning: {warning}", file=sys.stderr)
    return catalogue
