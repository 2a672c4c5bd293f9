"""`python -m runner.encoders`: train `ecapa_tiny`, and measure how well encoders tell speakers apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Codec = Annotated[str, typer.Option(help="Codec whose output is heard too: a name or folder; 'none' for none.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="New folder for model.safetensors, training.jsonl and result.json.")],
    data: Annotated[list[Path], typer.Option(help="Folder of speech; its train speakers are used. May be repeated.")],
    synthetic: Annotated[int, typer.Option(help="Synthetic speakers to add (8 to 80), or 0.")] = 80,
    codec: Codec = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 2200,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train ecapa_tiny; the checkpoint of the lowest equal error rate on dev is kept.

    Example: python -m runner.encoders train --data speech/ --out runs/ecapa_tiny
    """
    from runner.encoders import command
    from runner.encoders.train import Settings

    command.train(out, data, Settings(steps=steps, seed=seed), synthetic=synthetic, codec=_given(codec))


@app.command()
def compare(
    data: Annotated[list[Path], typer.Option(help="Folder of speech. May be repeated.")],
    encoder: Annotated[list[str], typer.Option(help="Name of a speaker encoder. May be repeated.")],
    split: Annotated[list[str], typer.Option(help="Whose speakers are told apart. May be repeated.")] = ["dev"],  # noqa: B006
    codec: Codec = "tiny",
) -> None:
    """Print size, speed and equal error rate of encoders on speech, and on the same speech after a codec.

    Example: python -m runner.encoders compare --data speech/ --encoder ge2e --encoder ecapa_tiny
    """
    from runner.encoders import command

    command.compare(encoder, data, splits=split, codec=_given(codec))


def _given(codec: str) -> str | None:
    return None if codec == "none" else codec


if __name__ == "__main__":
    from snac_core.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
