"""`runner pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: runner pretrain --data speech/ --out runs/base --set steps=20000")(pretrain)


def pretrain(
    out: Annotated[Path, typer.Option(help="Run folder; a stopped training in it is resumed.")],
    data: Annotated[list[str], typer.Option(help="Folder of speech; may be repeated.")] = [],  # noqa: B006
    preset: Annotated[str, typer.Option(help="tiny, snac_24khz, snac_32khz or snac_44khz.")] = "tiny",
    start: Annotated[str | None, typer.Option(help="Codec to continue from.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", help="key=value for any setting, e.g. --set lr=3e-4 --set adversary.start_step=500; repeatable."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train a base codec on speech, or fine-tune one. docs/bases.md lists all settings."""
    from snac_runner.cli.console import Stopped, say, terminal
    from snac_runner.config import with_overrides
    from snac_runner.pretrain.pretrain import pretrain as train
    from snac_runner.pretrain.settings import recipe

    options = {"data": data, "start": start, "steps": steps}
    changes = with_overrides({k: v for k, v in options.items() if v} | {"device": device}, set_)
    with terminal() as console:
        model = train(recipe(preset, **changes), out, console=console)
    if model is None:
        raise Stopped(f"stopped; run the same command again to resume the training in {out}")
    say(str(model))
