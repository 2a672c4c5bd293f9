"""`runner evaluate`: a trained run on other speech, another system's audio, files, or a judge itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snac_core.errors import UserError
from snac_runner.cli.console import Disable, Judge, Language, Plugin, WhisperName, catalogue_of, names_in, say, terminal
from snac_runner.cli.launch import ClusterAddress, check_cluster, without

if TYPE_CHECKING:
    from snac_runner.config import StudySettings
    from snac_runner.console import Console
    from snac_runner.resources import StudyResources


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: runner evaluate --audio wavs/ --pairs runs/study/pairs.json --name other_system")(
        evaluate
    )


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Trained run to evaluate on other speech.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of speech, or a manifest.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="pairs.json of a study: the conversions to evaluate.", show_default=False)
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Folder to write the pairs' audio into, for another system.", show_default=False),
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(help="Folder of another system's output: <pair>.wav for every pair.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of that system.")] = "other system",
    source: Annotated[
        Path | None, typer.Option(help="Source file of a conversion, or a folder of them.", show_default=False)
    ] = None,
    converted: Annotated[
        Path | None, typer.Option(help="Converted file, or a folder with the names of the sources.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Speech of the target: a file, or a folder.", show_default=False)
    ] = None,
    edit_scale: Annotated[
        float, typer.Option(help="With RUN: factor of the edits; 0 is the bare codec, above 1 converts more.")
    ] = 1.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the error rates of a judge on real speech.")
    ] = False,
    judge: Judge = None,
    whisper: WhisperName = None,
    language: Language = None,
    base: Annotated[
        str, typer.Option(help="Codec that resynthesizes the trials: tiny, a folder, or a hub id.")
    ] = "tiny",
    split: Annotated[list[str], typer.Option(help="Split with the speakers to calibrate on; may be repeated.")] = [  # noqa: B006
        "dev"
    ],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    cluster: ClusterAddress = None,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Evaluate a trained run on other speech (RUN --data), another system's audio (--audio --pairs), or a judge.

    --source, --converted and --target score files that belong to no study. Runs and other systems are judged as their
    study was, if --judge, --whisper and --language do not say otherwise; files and --calibrate by ge2e.
    """
    ways = (("RUN", run), ("--pairs", pairs), ("--converted", converted), ("--calibrate", calibrate))
    wanted = [what for what, given in ways if given]
    if len(wanted) != 1:
        raise UserError(
            f"{' and '.join(wanted) or 'nothing to evaluate'}; give one of: RUN with --data, "
            "--pairs with --audio or --export, --source with --converted and --target, --calibrate with --data"
        )
    if edit_scale != 1.0 and run is None:
        raise UserError("--edit-scale is for the edits of a run; give RUN with --data")
    if cluster is not None:
        if run is None and audio is None:
            raise UserError("--cluster is for conversions of a run (RUN) or of another system (--audio); leave it out")
        check_cluster(device, None, None)
    if converted is not None:
        if source is None or target is None:
            raise UserError("--converted needs --source (what was converted) and --target (speech of the target)")
        by = _given(judges=judge and names_in(judge), whisper=whisper, language=language, device=device)
        evaluate_files((source, converted, target), by, (plugin, disable_plugin))
        return
    if pairs is None and data is None:
        raise UserError("no data: give a folder of speech with --data DIR (`runner data synth` makes one)")
    if pairs is not None and (audio is None) == (export is None):
        raise UserError(
            "--pairs needs one of --audio DIR (audio to evaluate) and --export DIR (folder for the audio to convert)"
        )
    plugins = (plugin, disable_plugin)
    if calibrate:
        for judged in names_in(judge or JUDGE):
            calibrate_judge(judged, Path(str(data)), base, split, device, plugins)
        return
    changes = _given(judges=judge and tuple(names_in(judge)), whisper=whisper, language=language, device=device)
    if data is not None:
        changes["data"] = str(Path(data).resolve())
    if run is not None:
        evaluate_run(run, out, changes, plugins, edit_scale, cluster)
        return
    if judge is not None:
        raise UserError("--judge: a system is compared with the arms by the judges of their study; leave it out")
    if export is not None:
        export_pairs(Path(str(pairs)), export, changes, plugins)
    elif audio is not None:
        evaluate_audio(Path(str(pairs)), audio, name, changes, plugins, cluster)


JUDGE = "ge2e"  # of files, and to calibrate, if none is given
Plugins = tuple[list[str], list[str]]
"""Plugin files, and installed plugins to leave out."""
Changes = dict[str, Any]
"""Settings that differ from those of the study."""


def evaluate_run(
    run: Path, out: Path | None, changes: Changes, plugins: Plugins, edit_scale: float, cluster: str | None = None
) -> None:
    """Evaluate a trained run on other speech, or with scaled edits, into its own folder."""
    from snac_runner.cli.train import print_report
    from snac_runner.external import evaluate_on_other_speech, study_of_other_speech
    from snac_runner.run_folder import stored_run

    study, arm = stored_run(run)
    with terminal() as console:
        resources = _resources(study, changes, plugins, console)
        resources.study = study_of_other_speech(resources.study, resources.corpus, console)
        scaled = f"-scale{edit_scale:g}" if edit_scale != 1.0 else ""
        out = out or run / "elsewhere" / f"{resources.corpus.name}-{resources.corpus.digest[:8]}{scaled}"
        with _on_cluster(cluster, resources, plugins):
            evaluate_on_other_speech(run, arm, out, resources, edit_scale)
    print_report(out)


def export_pairs(pairs: Path, out: Path, changes: Changes, plugins: Plugins) -> None:
    """Write what another system needs to convert a study's pairs."""
    from snac_runner.external import export

    with terminal() as console:
        resources = _resources_of_pairs(pairs, changes, plugins, console)
        count = export(resources, out, str(pairs))
    say(f"{count} conversions to {out}; {out / 'README.txt'} explains how to evaluate the converted audio")


def evaluate_audio(
    pairs: Path, audio: Path, name: str, changes: Changes, plugins: Plugins, cluster: str | None = None
) -> None:
    """Evaluate another system's output for a study's pairs."""
    from snac_runner import external
    from snac_runner.cli.train import print_report

    folder = pairs.resolve().parent
    with terminal() as console:
        resources = _resources_of_pairs(pairs, changes, plugins, console)
        with _on_cluster(cluster, resources, plugins):
            place = external.evaluate_audio(audio, name, folder, resources)
    say(f"evaluated: {place}")
    print_report(folder)


@contextmanager
def _on_cluster(address: str | None, resources: StudyResources, plugins: Plugins) -> Iterator[None]:
    """Share out the evaluation of conversions over a Ray cluster, if there is an address."""
    if address is None:
        yield
        return
    from snac_runner.cli.train import stopping
    from snac_runner.cluster import connected
    from snac_runner.remote_resources import Setup, spread

    files, disable = plugins
    study = resources.study.model_copy(update={"plugins": (*resources.study.plugins, *files)})
    gpus = 0 if study.device == "cpu" else None
    with stopping("give the same command again to continue"), connected(address, resources.console, gpus=gpus) as found:
        setup = Setup.of(study, disable, found, without(sys.argv[1:]))
        resources.spread = partial(spread, cluster=found, setup=setup)
        yield


_ARROWS = {"up": "↑", "down": "↓"}


def evaluate_files(paths: tuple[Path, Path, Path], by: Changes, plugins: Plugins) -> None:
    """Print the scores of converted files, given the paths of source, conversion and target, and what judges them."""
    import torch

    from snac_core.settings import checked
    from snac_runner.config import StudySettings
    from snac_runner.devices import device_named
    from snac_runner.evaluate.files import matched, pooled, score_file
    from snac_runner.evaluate.judges import load_judges
    from snac_runner.evaluate.scoring import available
    from snac_runner.evaluate.whisper import find_whisper, not_found
    from snac_runner.report.format import display_of

    device = device_named(by["device"])
    language = checked(StudySettings, {"language": by.get("language", "en")}, "evaluate").language
    with terminal() as console:
        catalogue = catalogue_of(*plugins, console)
        conversions = matched(*paths)
        judges = [judge.to(device) for judge in load_judges(by.get("judges", [JUDGE]), catalogue)]
        whisper = find_whisper(by.get("whisper", ""), language, device, workers=torch.get_num_threads())
        if whisper is None:
            console.line(f"words are not judged: {not_found(language)}")
        metrics, _ = available(catalogue, language=language, recogniser=lambda: whisper)
        rows = []
        progress = console.progress("scoring")
        for number, files in enumerate(conversions, 1):
            rows.append(score_file(files, judges, metrics))
            progress(number, len(conversions), files.converted.name)
    named = ", ".join(judge.name for judge in judges)
    say(f"{len(conversions)} conversion(s), judged by {named}; mean over the files that a metric applies to")
    lines = []
    for (name, judge), (mean, count) in pooled(rows).items():
        metric = metrics.get(name)
        unit, arrow = (metric.unit, _ARROWS[metric.direction]) if metric else ("cosine", _ARROWS["up"])
        label = display_of(name).label + (f" ({judge})" if judge and len(judges) > 1 else "")
        fewer = f"  ({count} files)" if count < len(rows) else ""
        lines.append((label, f"{mean:8.3f}  {', '.join(part for part in (unit, arrow) if part)}{fewer}"))
    width = max(42, *(len(label) for label, _ in lines))
    for label, value in lines:
        say(f"  {label:{width}} {value}")


def calibrate_judge(judge: str, data: Path, base: str, splits: list[str], device: str, plugins: Plugins) -> None:
    """Measure a judge on real trials, keep the outcome, and print it."""
    from snac_core.codec import SNAC
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.devices import device_named
    from snac_runner.evaluate.judges import calibrate, described, load_judges

    with terminal() as console:
        encoder = load_judges([judge], catalogue_of(*plugins, console))[0].to(device_named(device))
        codec = SNAC.from_pretrained(base).freeze()  # on the CPU, where its noise is reproducible
        corpus = open_corpus(data, warn=console.warning, progress=console.progress("reading the audio files"))
        found, path = calibrate(encoder, corpus, codec, base=base, splits=tuple(dict.fromkeys(splits)), console=console)
    say(f"{found.judge} on {found.data}, {' and '.join(found.splits)}, after {found.base}")
    say(described(found))
    say(f"accepted as the target from a cosine of {found.threshold:.3f} on (reference x codec)")
    say(f"kept in {path}")


def _given(**options: Any) -> Changes:
    return {name: value for name, value in options.items() if value is not None}


def _resources_of_pairs(pairs: Path, changes: Changes, plugins: Plugins, console: Console) -> StudyResources:
    """Resources of the study with this list of pairs.

    Raises:
        UserError: if the list is not that of the study beside it, or does not fit the data.
    """
    from snac_runner.data.pairs import PairList
    from snac_runner.run_folder import study_of

    listed, folder = PairList.load(pairs), pairs.resolve().parent
    resources = _resources(study_of(folder), changes, plugins, console)
    listed.check(resources.corpus)
    if resources.test_pairs.digest != listed.digest:
        raise UserError(f"{pairs} is not the list of the study in {folder}: the study's settings give another list")
    return resources


def _resources(study: StudySettings, changes: Changes, plugins: Plugins, console: Console) -> StudyResources:
    """Resources of a study, with changed settings."""
    from snac_core.settings import checked
    from snac_runner.config import StudySettings
    from snac_runner.resources import StudyResources

    study = checked(StudySettings, {**study.model_dump(exclude_unset=True), **changes}, "evaluate")
    files, disable = plugins
    return StudyResources(study, catalogue_of([*study.plugins, *files], disable, console), console=console)
