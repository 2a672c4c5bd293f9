"""`python -m runner.phones`: train the phone recogniser, and measure what content judges can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and all that is made on the way.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder of speech; its train speakers are used. May be repeated.")
    ] = [],  # noqa: B006
    codec: Annotated[str, typer.Option(help="Codec whose output is heard too: a name or folder.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train the recogniser; called again after a stop it goes on.

    Example: python -m runner.phones train --data speech/ --out runs/phones_tiny
    """
    from runner.phones import command
    from runner.phones.train import Settings

    command.train(out, data, Settings(steps=steps, seed=seed), codec=codec)


@app.command()
def compare(
    data: Annotated[list[Path], typer.Option(help="Folder of speech. May be repeated.")],
    split: Annotated[list[str], typer.Option(help="Whose speakers are heard. May be repeated.")] = ["dev", "test"],  # noqa: B006
    codec: Annotated[list[str], typer.Option(help="Name or folder of a codec. May be repeated.")] = ["tiny"],  # noqa: B006
    judge: Annotated[list[str], typer.Option(help="phones, words or spelt. May be repeated.")] = ["phones"],  # noqa: B006
    weights: Annotated[Path | None, typer.Option(help="Weights of the recogniser instead of the bundled ones.")] = None,
    most: Annotated[int, typer.Option(min=2, help="Utterances of each split.")] = 64,
) -> None:
    """Print error rates of content judges on speech, on a codec's output of it, and on other words than were said.

    Example: python -m runner.phones compare --data speech/ --judge phones --judge words
    """
    from runner.phones import command

    weights_of = None if weights is None else str(weights)
    command.compare(data, splits=split, codecs=codec, judges=judge, weights=weights_of, most=most)


if __name__ == "__main__":
    from snac_core.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
