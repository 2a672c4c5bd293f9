"""`runner quickstart`, `train`, `ablate`, `report`: from options to settings, a study, and its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snac_core.errors import UserError
from snac_runner.cli.console import (
    Disable,
    Judge,
    Language,
    Plugin,
    Stopped,
    WhisperName,
    catalogue_of,
    is_first,
    names_in,
    say,
    terminal,
)
from snac_runner.cli.launch import (
    ClusterAddress,
    CpusPerRun,
    Devices,
    GpusPerRun,
    check_cluster,
    check_devices,
    without,
)

if TYPE_CHECKING:
    from snac_core.plugins import Catalogue
    from snac_runner.config import ArmSettings
    from snac_runner.console import Console

Strategy = Annotated[list[str], typer.Option("--strategy", help="Strategy of the arm; may be repeated.")]
Strategies = Annotated[str, typer.Option(help="Arms, separated by commas; a+b is one arm with two strategies.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="Folder of speech, or a manifest.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="Codec: tiny, a folder, or a hub id.", show_default=False)]
Encoder = Annotated[str | None, typer.Option(help="Speaker encoder for conditioning and losses.", show_default=False)]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", show_default=False)]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default=False)]
Set = Annotated[
    list[str], typer.Option("--set", help="key=value of any setting, e.g. --set lr=3e-4 --set NAME.key=value.")
]


SYNTHETIC_SPEAKERS, SYNTHETIC_SENTENCES = 40, 12
"""Size of the embedded corpus: speakers, and sentences of each."""

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "crop_seconds": 0.64,
    "lr": 2e-3,
    "warmup_steps": 4,
    "test_pairs": 16,
    "dev_pairs": 0,  # nothing is chosen on dev speakers
    "pair_seconds": 3.0,
    "shuffled_control": False,  # a control that takes as long as an arm
    # predictors of naturalness give synthetic voices the score of noise; spk_synth takes another output
    "exclude_metrics": ["distillmos", "distillmos_identity", "spk_synth", "pesq", "mcd", "f0_rmse"],
}
"""Settings of the quickstart: small batches of short crops, and no measure that takes long and decides nothing."""


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: runner quickstart")(quickstart)
    app.command(epilog="Example: runner train --strategy NAME --data speech/ (runner plugins lists the names)")(train)
    app.command(epilog="Example: runner ablate --strategies NAME1,NAME2,NAME1+NAME2 --data speech/ --seeds 2")(ablate)
    app.command(epilog="Example: runner report runs/quickstart/study")(report)


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each arm.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="First of their seeds; also of the choice of voices and pairs.")] = 0,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train every installed adapter side by side on synthetic speech, and write the comparative report."""
    from snac_core.checkpoint import Stored, bundled_adapters
    from snac_runner.config import compose, to_toml
    from snac_runner.data.synth import synthesize
    from snac_runner.resources import StudyResources
    from snac_runner.study import run_study

    with terminal() as console:
        catalogue = catalogue_of(plugin, disable_plugin, console)
        speech = synthesize(
            out / "speech", speakers=SYNTHETIC_SPEAKERS, sentences=SYNTHETIC_SENTENCES, seed=seed, dev=False,
            progress=console.progress("speech synthesis"),
        )  # fmt: skip
        trained = [
            name
            for name in bundled_adapters()
            if all(strategy.name in catalogue.strategies for strategy in Stored.find(name).description.strategies)
        ]
        values: dict[str, Any] = {
            "study": {
                "name": "quickstart", "data": str(speech), "seeds": list(range(seed, seed + seeds)), "pair_seed": seed,
                "steps": steps, **QUICK, "adapters": trained,
                "plugins": [str(Path(file).resolve()) for file in plugin],
            },
            "arm": [{"strategies": [name]} for name in adapters(catalogue)],
        }  # fmt: skip
        study, arms, rates = compose(values["study"], values["arm"], "quickstart")
        resources = StudyResources(study, catalogue, console=console)
        with stopping(f"give the same command again to continue in {out / 'study'}"):
            runs = run_study(out / "study", arms, rates, resources, to_toml(values))
    print_report(out / "study", runs)


def train(
    strategy: Strategy = [],  # noqa: B006
    config: Annotated[Path | None, typer.Option(help="Settings as TOML, or JSON.", show_default=False)] = None,
    out: Out = None,
    data: Data = None,
    base: Base = None,
    speaker_encoder: Encoder = None,
    judge: Judge = None,
    whisper: WhisperName = None,
    language: Language = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", show_default=False)] = None,
    device: Device = None,
    devices: Devices = None,
    save_every: SaveEvery = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to resume; with --steps, a longer run in a new folder.", show_default=False),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Trained strategies to start from: a run, a bundled adapter, or a hub id.", show_default=False
        ),
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation/--no-evaluation", help="Evaluate on dev and test speakers.")
    ] = True,
    set_: Set = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train one arm with one seed, evaluate it on test speakers, and write its run folder.

    Without --data, a synthetic corpus is used. --resume accepts --data, --base and --device, for a folder that has
    moved, and --plugin; their content must be the same.
    """
    from snac_core.settings import checked
    from snac_runner.config import StudySettings, compose, with_data, with_overrides, with_plugins
    from snac_runner.controls import run_controls
    from snac_runner.distributed import distributed_context
    from snac_runner.lock import locked
    from snac_runner.resources import StudyResources
    from snac_runner.run_folder import run_config, stored_run
    from snac_runner.study import continue_longer, run_arms

    options = _given(data=data, base=base, speaker_encoder=speaker_encoder, judges=judge and names_in(judge),
                     whisper=whisper, language=language, steps=steps, device=device, save_every=save_every, start=start,
                     seeds=None if seed is None else [seed])  # fmt: skip
    if not evaluation:
        if twice := {"dev_pairs", "test_pairs"} & {assignment.partition("=")[0].strip() for assignment in set_}:
            raise UserError(f"--no-evaluation is dev_pairs = 0 and test_pairs = 0; leave out --set {min(twice)}")
        options |= {"dev_pairs": 0, "test_pairs": 0}
    longer, files = False, [str(Path(file).resolve()) for file in plugin]
    with terminal() as console:
        if resume is not None:
            moved = with_data({key: options.pop(key) for key in ("data", "base", "device") if key in options}, None)
            total = options.pop("steps", None)
            if strategy or config or options or set_ or (out and total is None):
                raise UserError(
                    "--resume continues the run as it was configured; with it, only --data, --base, --device, "
                    "--plugin, and --steps with --out are possible"
                )
            study, arm = stored_run(resume)
            study = checked(StudySettings, {**study.model_dump(exclude_unset=True), **moved}, "--resume")
            if total is not None and total != study.steps:
                longer, out = True, out or resume.with_name(f"{resume.name}-{total}steps")
                study = checked(StudySettings, {**study.model_dump(exclude_unset=True), "steps": total}, "--steps")
            else:
                out = resume
        else:
            values = read_settings(config, plugin, disable_plugin, console)[0] if config else {}
            for name in strategy:
                if "+" in name or "," in name:
                    raise UserError(f"--strategy {name!r}: give --strategy once for each strategy of the arm")
            if strategy:
                values["strategies"] = strategy
            if not values.get("strategies"):
                known = ", ".join(adapters(catalogue_of(plugin, disable_plugin, console)))
                raise UserError(f"no strategy; give --strategy NAME, one of: {known}")
            values = with_overrides({**values, **options}, set_)
            of_study = {key: value for key, value in values.items() if key in StudySettings.model_fields}
            of_arm = {key: value for key, value in values.items() if key not in of_study}
            of_study = with_plugins(with_data(of_study, config), plugin)
            where = str(config or "train")
            study, (arm,), _ = compose(of_study, [of_arm], where)
            if len(study.seeds) != 1:
                raise UserError(f"train makes one run; got seeds {list(study.seeds)}; runner ablate makes several")
        moved_files = resume is not None and files  # a run's configuration has their digests
        stored = [file for file in study.plugins if not moved_files or Path(file).is_file()]
        catalogue = catalogue_of(dict.fromkeys([*stored, *files]), disable_plugin, console)
        check_strategies([arm], catalogue)
        check_devices(devices, study.device)
        with ExitStack() as stack:
            context = stack.enter_context(distributed_context(study.device))
            if not study.data:
                of_study = context.first_decides(lambda: synthetic_speech(of_study, console))
                study, (arm,), _ = compose(of_study, [of_arm], where)
            resources = StudyResources(study, catalogue, console=console, context=context)
            out = out or Path("runs") / study.name / arm.title / f"seed{study.seeds[0]}"
            if longer and resume:
                longer_run = run_config(arm, study.seeds[0], resources)
                context.first_decides(partial(continue_longer, resume, out, longer_run))
                console.line(f"{resume} stays as it is; training continues to {study.steps} steps in {out}")
            if context.first:
                stack.enter_context(locked(out, "is training the run in"))
            with stopping(f"continue with: runner train --resume {out}", begun=out / "config.json"):
                run_arms([arm], {(arm.title, study.seeds[0]): out}, resources, controls=out)
                if study.test_pairs:
                    run_controls(out, resources)
    say(f"run: {out}")
    if study.test_pairs:
        print_report(out, [out])
    else:
        raise_failures([out])
        command = ["runner", "convert", "--run", str(out)]
        command += [part for file in study.plugins for part in ("--plugin", file)]
        command += [part for name in disable_plugin for part in ("--disable-plugin", name)]
        say(f"not evaluated; convert with: {shlex.join(command)} --source a.wav --target b.wav --out c.wav")


def ablate(
    study: Annotated[Path | None, typer.Argument(help="Study file (TOML).", show_default=False)] = None,
    strategies: Strategies = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each arm.", show_default=False)] = None,
    out: Out = None,
    data: Data = None,
    base: Base = None,
    speaker_encoder: Encoder = None,
    judge: Judge = None,
    whisper: WhisperName = None,
    language: Language = None,
    steps: Steps = None,
    device: Device = None,
    devices: Devices = None,
    cluster: ClusterAddress = None,
    gpus_per_run: GpusPerRun = None,
    cpus_per_run: CpusPerRun = None,
    save_every: SaveEvery = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its estimated cost, then exit.")
    ] = False,
    set_: Set = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train arms side by side for every seed, and write the comparative report. Unfinished runs are resumed.

    Without data, a synthetic corpus is used.
    """
    import torch

    from snac_runner.cluster import connected
    from snac_runner.config import check_tables, compose, to_toml, with_data, with_overrides, with_plugins
    from snac_runner.distributed import DistributedContext, distributed_context
    from snac_runner.dry_run import describe_plan
    from snac_runner.remote_units import run_on_cluster
    from snac_runner.resources import StudyResources
    from snac_runner.study import run_study
    from snac_runner.unit import Execute, run_in_turn

    if (study is None) == (not strategies):
        raise UserError("give a study file, or --strategies a,b,a+b (one of the two)")
    options = _given(data=data, base=base, speaker_encoder=speaker_encoder, judges=judge and names_in(judge),
                     whisper=whisper, language=language, steps=steps, device=device, save_every=save_every,
                     seeds=None if seeds is None else list(range(seeds)))  # fmt: skip
    with terminal() as console:
        if study is None:
            named = [[name.strip() for name in arm.split("+")] for arm in strategies.split(",")]
            if not all(all(arm) for arm in named):
                raise UserError(f"--strategies {strategies!r} has an empty name; expected a,b,a+b")
            values: dict[str, Any] = {"study": {"name": "ablation"}, "arm": [{"strategies": arm} for arm in named]}
        else:
            values, original = read_settings(study, plugin, disable_plugin, console)
            if original:  # the settings of one arm
                values = {"study": values, "arm": [{k: values.pop(k) for k in ("strategies", "objectives")}]}
            values = check_tables(values, str(study))
        shared = with_overrides({**values["study"], **options}, set_)
        values = {"study": with_plugins(with_data(shared, study), plugin), "arm": values["arm"]}
        where = str(study or "ablate")
        settings, arms, rates = compose(values["study"], values["arm"], where)
        if not arms:
            raise UserError(f"{where} has no [[arm]]; expected at least one, with strategies = [...]")
        if not settings.test_pairs:
            raise UserError(f"{where}: test_pairs = 0; a study compares arms on test conversions, expected at least 2")
        catalogue = catalogue_of(settings.plugins, disable_plugin, console)
        check_strategies(arms, catalogue)
        if cluster is not None:
            check_cluster(settings.device, devices, gpus_per_run)
        check_devices(None if dry_run else devices, settings.device)
        with ExitStack() as stack:
            machines = None
            if cluster is not None and not dry_run:
                gpus = 0 if settings.device == "cpu" else gpus_per_run
                machines = stack.enter_context(connected(cluster, console, gpus=gpus, cpus=cpus_per_run))
                context = DistributedContext(torch.device("cpu"))  # the machines of the cluster may have others
            else:
                context = stack.enter_context(distributed_context(settings.device))
            if not settings.data:
                values["study"] = context.first_decides(lambda: synthetic_speech(values["study"], console))
                settings, arms, rates = compose(values["study"], values["arm"], where)
            resources = StudyResources(settings, catalogue, console=console, context=context)
            out = out or Path("runs") / settings.name
            if dry_run:
                say(describe_plan(arms, rates, resources))
                return
            execute: Execute = run_in_turn
            if machines:
                execute = partial(
                    run_on_cluster, cluster=machines, root=out, disable=disable_plugin, command=without(sys.argv[1:])
                )
            with stopping(f"give the same command again to continue in {out}"):
                runs = run_study(out, arms, rates, resources, to_toml(values), execute)
    print_report(out, runs)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folder of a study or a run; several make a leaderboard.")],
    votes: Annotated[
        list[Path], typer.Option(help="File of votes, exported by abx.html; may be repeated.", show_default=False)
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder to write a leaderboard into.")] = Path("leaderboard"),
) -> None:
    """Write report.html, .md, .json and tables from the result files of a study, or of several comparable ones."""
    from snac_runner.report.page import add_votes, build, build_leaderboard, summary

    if len(folders) > 1:
        if votes:
            raise UserError("--votes belong to one study; give its folder alone")
        page, text, refused = build_leaderboard(folders, out)
        print("\n".join([*refused, text, str(page)]))
        return
    for file in votes:
        add_votes(folders[0], file)
    page = build(folders[0])
    print(summary(folders[0]))
    print(page)


def adapters(catalogue: Catalogue) -> list[str]:
    """Names of the strategies that edit the signal."""
    return [
        name
        for name in catalogue.strategies
        if any(hasattr(catalogue.strategies[name], hook) for hook in ("before_vq", "after_vq"))
    ]


def read_settings(
    file: Path, plugins: Sequence[str], disable: Sequence[str], console: Console
) -> tuple[dict[str, Any], bool]:
    """Plain values of a settings file, and whether it is an original phase 3, 4 or 6 file, which is translated."""
    from snac_core.plugins import discover
    from snac_runner.config import read_values, with_data, with_plugins
    from snac_runner.legacy_config import is_original, translated

    values = read_values(file)
    files = with_plugins(with_data(values, file), plugins).get(
        "plugins", []
    )  # their strategies may own keys of the file
    strategies = discover(files, disable=disable).strategies
    if not is_original(values, strategies):
        return values, False
    settings, remarks = translated(values, str(file), strategies)
    for remark in remarks:
        console.warning(remark)
    return settings, True


def check_strategies(arms: Sequence[ArmSettings], catalogue: Catalogue) -> None:
    """Raise UserError for an unknown strategy, or a wrong setting of one, before anything is loaded."""
    from snac_core.settings import validated

    for arm in arms:
        for name in arm.all_strategies:
            validated(catalogue.strategies[name], arm.settings.get(name, {}))


def synthetic_speech(shared: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """The settings with the embedded synthetic corpus as data, which is synthesized into the cache once; says so."""
    from snac_runner.data.cache import cache_folder
    from snac_runner.data.synth import synthesize

    folder = synthesize(
        cache_folder() / f"synthetic-{SYNTHETIC_SPEAKERS}x{SYNTHETIC_SENTENCES}",
        speakers=SYNTHETIC_SPEAKERS, sentences=SYNTHETIC_SENTENCES, progress=console.progress("speech synthesis"),
    )  # fmt: skip
    console.line(f"no --data: using {SYNTHETIC_SPEAKERS} synthetic speakers in {folder}; --data DIR uses your speech")
    return {**shared, "data": str(folder)}


@contextmanager
def stopping(remedy: str, *, begun: Path | None = None) -> Iterator[None]:
    """Turn Ctrl-C, and the loss of another process, into `Stopped`.

    Args:
        remedy: the command that continues.
        begun: the file that exists if there is something to continue; None: there always is.
    """
    from snac_runner.distributed import ProcessLost

    try:
        yield
    except (KeyboardInterrupt, ProcessLost) as stop:
        if begun and not begun.is_file():
            remedy = "nothing was trained yet"
        raise Stopped(f"{str(stop) or 'stopped'}; {remedy}") from None


def print_report(folder: Path, runs: Sequence[Path] = ()) -> None:
    """Write the report of a study, or of a single run, and print its summary.

    Raises:
        UserError: if all of `runs` failed.
    """
    if not is_first():
        return
    from snac_runner.report.page import build, summary

    page = build(folder)
    say(summary(folder))
    say(f"report: {page}")
    raise_failures(runs, page)


def raise_failures(runs: Sequence[Path], page: Path | None = None) -> None:
    """Raise UserError if all of `runs` failed; `page` is the report of several."""
    from snac_runner.run_folder import read_result

    results = [read_result(run) for run in runs]
    if results and all(result.get("status") == "failed" for result in results):
        if len(runs) > 1:
            raise UserError(f"every run of the study failed; {page} says why")
        raise UserError(f"the run failed: {results[0]['error']} (see {runs[0] / 'training.log'})")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
