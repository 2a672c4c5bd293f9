"""What `runner evaluate RUN --data` and `runner evaluate --pairs` do, from their options to the report.

`runner evaluate`: a judge, a trained run on other speech, or another system's audio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from snac_core.errors import UserError
from snac_runner.cli.console import Disable, Plugin, catalogue_of, say, terminal
from snac_runner.cli.train import stored_run
from snac_runner.config import StudySettings, compose, read_values
from snac_runner.data.pairs import PairList
from snac_runner.external import export, judge_elsewhere, judge_returned
from snac_runner.report.page import build, summary
from snac_runner.resources import StudyResources


def judge_run(
    run: Path, data: str, out: Path | None, device: str, plugins: Sequence[str], disable: Sequence[str] = ()
) -> None:
    """Judge a trained run on other speech, into a folder of its own."""
    stored, arm = stored_run(run)
    study = stored.model_copy(update={"data": str(Path(data).resolve()), "device": device})
    with terminal() as console:
        resources = StudyResources(study, catalogue_of([*study.plugins, *plugins], disable, console), console=console)
        place = out or run / "elsewhere" / f"{resources.corpus.name}-{resources.corpus.digest[:8]}"
        judge_elsewhere(run, study, arm, place, resources, console)
        page = build(place)
    say(summary(place))
    say(f"report: {page}")


def judge_audio(
    pairs: Path, audio: Path | None, out: Path | None, name: str, data: str | None, device: str,
    plugins: Sequence[str], disable: Sequence[str] = (),
) -> None:  # fmt: skip
    """Export a study's conversions for another system (`out`), or judge what it made of them (`audio`)."""
    listed, folder = PairList.load(pairs), pairs.resolve().parent
    study = _study_of(folder).model_copy(update={"device": device})
    if data is not None:
        study = study.model_copy(update={"data": str(Path(data).resolve())})
    with terminal() as console:
        resources = StudyResources(study, catalogue_of([*study.plugins, *plugins], disable, console), console=console)
        listed.check(resources.corpus)
        if resources.test_pairs.digest != listed.digest:
            raise UserError(f"{pairs} is not the list of the study in {folder}: its settings give another one")
        if out is not None:
            count = export(resources, out, str(pairs))
            say(f"{count} conversions to {out}; {out / 'README.txt'} says how to bring them back")
            return
        assert audio is not None
        place = judge_returned(audio, name, folder, study, resources, console)
        page = build(folder)
    say(summary(folder))
    say(f"judged: {place}")
    say(f"report: {page}")


def _study_of(folder: Path) -> StudySettings:
    """The settings of the study, or of the single run, in `folder`."""
    if (folder / "study.toml").is_file():
        values = read_values(folder / "study.toml")
        return compose(values.get("study", {}), values.get("arm", []), str(folder / "study.toml"))[0]
    if (folder / "config.json").is_file():
        return stored_run(folder)[0]
    raise UserError(f"{folder} holds no study beside the list of pairs; give the pairs.json in the study's own folder")


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

    if run is not None:
        judge_run(run, str(data), out, device, plugin, disable_plugin)
    elif pairs is not None:
        judge_audio(pairs, audio, export, name, data, device, plugin, disable_plugin)
    return None


def _calibrate(
    data: Path, judge: str, base: str, splits: list[str], device: str, plugins: list[str], disable: list[str]
) -> None:
    from snac_core.codec import SNAC
    from snac_core.speakers.encoder import load_speaker_encoder
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.evaluate.judges import calibrate, described
    from snac_runner.resources import device_named

    with terminal() as console:
        place = device_named(device)
        encoder = load_speaker_encoder(judge, plugins=catalogue_of(plugins, disable, console)).to(place)
        codec = SNAC.from_pretrained(base).freeze()  # noise repeats on the CPU alone
        corpus = open_corpus(
            data,
            warn=console.warning,
            progress=console.progress("reading the audio files"),
        )
        found, path = calibrate(
            encoder, corpus, codec, base=base, splits=tuple(dict.fromkeys(splits)),
            console=console,
        )  # fmt: skip
    say(f"{found.judge} on {found.data}, {' and '.join(found.splits)}, after {found.base}")
    say(described(found))
    say(f"accepted as the target from a cosine of {found.threshold:.3f} on (reference x codec)")
    say(f"kept in {path}")
