"""`runner evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snac_core.errors import UserError


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: runner evaluate --calibrate --data speech/")(evaluate)


def evaluate(
    data: Annotated[Path | None, typer.Option(help="Folder of speech, or a manifest.", show_default=False)] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the judge itself, on real trials.")] = False,
    judge: Annotated[str, typer.Option(help="Speaker encoder of the scores.")] = "ge2e",
    base: Annotated[str, typer.Option(help="Codec that resynthesises the trials: tiny, a folder, a hub id.")] = "tiny",
    split: Annotated[list[str], typer.Option(help="Whose speakers; may be repeated.")] = ["dev"],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")] = "cpu",
    plugin: Annotated[list[str], typer.Option("--plugin", help="Python file with a plugin; may be repeated.")] = [],  # noqa: B006
) -> None:
    """Measure a judge: its equal error rate, threshold and scores on real speech, and after the codec."""
    if not calibrate:
        raise UserError("nothing to evaluate; give --calibrate")
    if data is None:
        raise UserError("no data: give a folder of speech with --data DIR (`runner data synth` makes one)")
    _calibrate(data, judge, base, split, device, plugin)


def _calibrate(data: Path, judge: str, base: str, splits: list[str], device: str, plugins: list[str]) -> None:
    from runner.cli.console import progress, say
    from runner.data import open_corpus
    from runner.evaluate.calibration import calibrate, described
    from runner.materials import device_named
    from snac_core.codec import SNAC
    from snac_core.plugins import discover
    from snac_core.speakers import load_speaker_encoder

    with progress() as console:
        place = device_named(device)
        encoder = load_speaker_encoder(judge, plugins=discover(plugins)).to(place)
        codec = SNAC.from_pretrained(base).freeze()  # noise repeats on the CPU alone
        corpus = open_corpus(
            data,
            console=lambda text: console.line(f"warning: {text}"),
            progress=lambda done, of: console.step("listening to the data", done, of, ""),
        )
        found, path = calibrate(
            encoder, corpus, codec, base=base, splits=tuple(dict.fromkeys(splits)),
            progress=lambda what, done, of: console.step(what, done, of, ""),
        )  # fmt: skip
    say(f"{found.judge} on {found.data}, {' and '.join(found.splits)}, after {found.base}")
    say(described(found))
    say(f"accepted as the target from a cosine of {found.threshold:.3f} on (reference x codec)")
    say(f"kept in {path}")
