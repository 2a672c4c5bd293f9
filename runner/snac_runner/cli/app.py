"""`runner app`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from snac_core.errors import UserError
from snac_runner.cli.console import Disable, Plugin, catalogue_of, say, terminal
from snac_runner.cli.convert import Device


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("app", epilog="Example: runner app --run runs/quickstart/study")(page)


def page(
    run: Annotated[
        list[str],
        typer.Option(help="Run folders, study folders (all their runs, and the report), or hub ids to offer."),
    ] = [],  # noqa: B006
    judge: Annotated[str, typer.Option(help="Speaker encoder that measures similarity.")] = "ge2e",
    host: Annotated[str, typer.Option(help="Address to listen on; others than 127.0.0.1 have no password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is any free one.")] = 7860,
    max_mb: Annotated[float, typer.Option(help="Maximum size of an uploaded file, in MB.")] = 200.0,
    max_minutes: Annotated[float, typer.Option(help="Maximum length of a recording, in minutes.")] = 10.0,
    device: Device = "auto",
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Open a local page in the browser: record or upload speech, convert it, compare adapters, read reports.

    Ctrl-C stops it.
    """
    from snac_runner.app.server import gradio_folder, is_loopback, listen

    if not (max_mb > 0 and max_minutes > 0):
        raise UserError(f"--max-mb {max_mb:g}, --max-minutes {max_minutes:g}: expected positive numbers")
    with gradio_folder() as folder, listen(host, port) as bound:
        from snac_runner.app.adapters import offer
        from snac_runner.app.conversion import Conversions, Limits
        from snac_runner.app.server import serve, web_application

        offered = offer(run, typed=is_loopback(host))
        with terminal() as console:
            conversions = Conversions(
                offered, Limits(max_mb, max_minutes), folder,
                judge=judge, device=device, catalogue=catalogue_of(plugin, disable_plugin, console),
            )  # fmt: skip
            if not is_loopback(host):
                console.warning("everyone who can reach this machine can use the page; it has no password")

        def started(address: str) -> None:
            say(f"open {address} in a browser; Ctrl-C stops the page")
            sys.stdout.flush()

        serve(web_application(conversions, host), bound, started)
    say("stopped")
    sys.stdout.flush()
    os._exit(0)  # a thread may still convert: its result has no reader
