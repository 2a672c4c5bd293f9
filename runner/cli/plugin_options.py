"""The options of every command that loads plugins, and the plugins they name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from snac_core.plugins import Catalogue

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
