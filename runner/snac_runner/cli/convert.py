"""`runner convert`, `runner encode` and `runner decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snac_runner.cli.console import Disable, Plugin, catalogue_of

Run = Annotated[Path, typer.Option(help="Folder of a trained run, or of its model.")]
Target = Annotated[list[Path], typer.Option("--target", help="Speech of the target speaker; may be repeated.")]
Base = Annotated[
    str | None,
    typer.Option(help="Codec. Default: the base of the run, or tiny without a run.", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: runner convert --run RUN --source a.wav --target b.wav --out c.wav")(convert)
    app.command(epilog="Example: runner encode --source a.wav --out codes.safetensors --run RUN --target b.wav")(encode)
    app.command(epilog="Example: runner decode --codes codes.safetensors --out c.wav")(decode)


def convert(
    run: Run,
    source: Annotated[Path, typer.Option(help="Speech to convert.")],
    target: Target,
    out: Annotated[Path, typer.Option(help="Wav file to write.")],
    stages: Annotated[bool, typer.Option("--stages", help="Also write source, bare, identity, synthetic.")] = False,
    base: Base = None,
    device: Device = "cpu",
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Convert speech to the voice of a target speaker; the embeddings of several target files are averaged."""
    from snac_runner.convert import Converter

    converter = Converter(run, device, catalogue_of(plugin, disable_plugin), base=base)
    for path in converter.convert(source, target, out, stages=stages):
        print(path)


def encode(
    source: Annotated[Path, typer.Option(help="Speech to encode.")],
    out: Annotated[Path, typer.Option(help="File of codes to write (.safetensors).")],
    run: Annotated[
        Path | None, typer.Option(help="Trained run with a strategy that acts before VQ.", show_default=False)
    ] = None,
    target: Target = [],  # noqa: B006
    base: Base = None,
    device: Device = "cpu",
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Encode speech to a file of codes, with or without conditioning."""
    from snac_runner.convert import Converter

    print(Converter(run, device, catalogue_of(plugin, disable_plugin), base=base).encode(source, target, out))


def decode(
    codes: Annotated[Path, typer.Option(help="File of codes.")],
    out: Annotated[Path, typer.Option(help="Wav file to write.")],
    run: Annotated[
        Path | None, typer.Option(help="Trained run with a strategy that acts after VQ.", show_default=False)
    ] = None,
    target: Target = [],  # noqa: B006
    base: Base = None,
    device: Device = "cpu",
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Decode a file of codes to speech, with or without conditioning."""
    from snac_runner.convert import Converter

    print(Converter(run, device, catalogue_of(plugin, disable_plugin), base=base).decode(codes, target, out))
