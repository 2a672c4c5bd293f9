"""`runner evaluate`: a judge, a trained run on other speech, or another system's audio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runner.cli.plugin_options import Disable, Plugin, catalogue_of
from snac_core.errors import UserError


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: runner evaluate --audio wavs/ --pairs runs/study/pairs.json --name other_system")(
        evaluate
    )


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Trained run to judge on other speech.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of speech, or a manifest.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="pairs.json of a study: the conversions to judge.", show_default=False)
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the pairs' audio there for another system.", show_default=False)
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Another system's output: <pair>.wav for every pair.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="What to call that system.")] = "other system",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the judge itself, on real trials.")] = False,
    judge: Annotated[str, typer.Option(help="Speaker encoder to calibrate.")] = "ge2e",
    base: Annotated[str, typer.Option(help="Codec that resynthesises the trials: tiny, a folder, a hub id.")] = "tiny",
    split: Annotated[list[str], typer.Option(help="Whose speakers to calibrate on; may be repeated.")] = ["dev"],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")] = "cpu",
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Judge a trained run on other speech (RUN --data), another system's audio (--audio --pairs), or a judge itself."""
    wanted = [what for what, given in (("RUN", run), ("--pairs", pairs), ("--calibrate", calibrate)) if given]
    if len(wanted) != 1:
        raise UserError(
            f"{' and '.join(wanted) or 'nothing to evaluate'}; give one of: RUN with --data, "
            "--pairs with --audio or --export, --calibrate with --data"
        )
    if run is not None or calibrate:
        if data is None:
            raise UserError("no data: give a folder of speech with --data DIR (`runner data synth` makes one)")
        if calibrate:
            return _calibrate(Path(data), judge, base, split, device, plugin, disable_plugin)
    if pairs is not None and (audio is None) == (export is None):
        raise UserError(
            "--pairs needs one of --audio DIR (judge what is there) and --export DIR (write what to convert)"
        )
    from runner.cli.elsewhere import judge_audio, judge_run

    if run is not None:
        judge_run(run, str(data), out, device, plugin, disable_plugin)
    elif pairs is not None:
        judge_audio(pairs, audio, export, name, data, device, plugin, disable_plugin)
    return None


def _calibrate(
    data: Path, judge: str, base: str, splits: list[str], device: str, plugins: list[str], disable: list[str]
) -> None:
    from runner.cli.console import progress, say
    from runner.data import open_corpus
    from runner.evaluate.calibration import calibrate, described
    from runner.materials import device_named
    from snac_core.codec import SNAC
    from snac_core.speakers import load_speaker_encoder

    with progress() as console:
        place = device_named(device)
        encoder = load_speaker_encoder(judge, plugins=catalogue_of(plugins, disable, console.line)).to(place)
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
