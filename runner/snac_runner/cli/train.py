"""What `train`, `ablate` and `quickstart` do, from their options to the report.

`runner quickstart`, `train`, `ablate`, `report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from snac_core.errors import UserError
from snac_core.plugins import Catalogue
from snac_runner.cli.console import Disable, Plugin, Stopped, catalogue_of, say, terminal
from snac_runner.config import ArmSettings, StudySettings, compose, read_values, to_toml, with_overrides
from snac_runner.console import Console
from snac_runner.controls import run_controls, shuffled_arm
from snac_runner.dry_run import describe_plan
from snac_runner.legacy_config import is_original, translated
from snac_runner.report.page import build, summary
from snac_runner.resources import StudyResources
from snac_runner.run_folder import result_status
from snac_runner.study import check_study, choose_rates, run_arms, write_study


def quick(out: Path, steps: int, seeds: int, plugins: Sequence[str] = (), disable: Sequence[str] = ()) -> None:
    """Every adapter side by side on speech made here; the report at the end."""
    from snac_runner.data.synth import synthesize

    with terminal() as console:
        catalogue = catalogue_of(plugins, disable, console)
        speech = synthesize(
            out / "speech", speakers=40, sentences=12,
            progress=console.progress("speaking"),
        )  # fmt: skip
        values = {
            "study": {
                "name": "quickstart", "data": str(speech), "seeds": list(range(seeds)), "steps": steps,
                "crop_seconds": 0.96, "test_pairs": 16, "dev_pairs": 6, "pair_seconds": 3.0,
                "exclude_metrics": ["wer", "cer"],  # slow, and no use on these voices; phones are read instead
                "shuffled_control": False,  # a control that costs as much as an arm
                "plugins": list(plugins),
            },
            "arm": [{"strategies": [name]} for name in adapters(catalogue)],
        }  # fmt: skip
        _study(values, out / "study", catalogue, console)


def train_one(
    strategies: Sequence[str],
    config: Path | None,
    out: Path | None,
    resume: Path | None,
    options: dict[str, Any],
    assignments: Sequence[str],
    plugins: Sequence[str],
    disable: Sequence[str],
) -> None:
    """One arm, one seed, one run folder."""
    with terminal() as console:
        if resume is not None:
            if strategies or config or out or options or assignments:
                raise UserError("--resume goes on with the run as it was configured; give no other settings with it")
            study, arm = stored_run(resume)
            out = resume
        else:
            values = _original(read_values(config), str(config), console) if config else {}
            for name in strategies:
                if "+" in name or "," in name:
                    raise UserError(f"--strategy {name!r}: give --strategy once for each strategy of the arm")
            if strategies:
                values = {**values, "strategies": list(strategies)}
            if not values.get("strategies"):
                known = ", ".join(adapters(catalogue_of(plugins, disable, console)))
                raise UserError(f"no strategy; give --strategy NAME, one of: {known}")
            values = with_overrides({**values, **options}, assignments)
            arm_keys = {key: value for key, value in values.items() if key not in StudySettings.model_fields}
            shared = _located({k: v for k, v in values.items() if k in StudySettings.model_fields}, config)
            study, arms, _ = compose(_with_plugins(shared, plugins), [arm_keys], str(config or "train"))
            arm = arms[0]
            if len(study.seeds) != 1:
                raise UserError(f"train makes one run; got seeds {list(study.seeds)}; runner ablate makes several")
        catalogue = catalogue_of(dict.fromkeys([*study.plugins, *plugins]), disable, console)
        seed = study.seeds[0]
        out = out or Path("runs") / study.name / arm.title / f"seed{seed}"
        resources = StudyResources(study, catalogue, console=console)
        _check_names([arm], catalogue)
        try:
            run_arms(study, [arm], {(arm.title, seed): out}, resources, console, controls=out)
        except KeyboardInterrupt as stop:
            begun = (out / "config.json").is_file()
            again = f"go on with: runner train --resume {out}" if begun else "nothing was trained yet"
            raise Stopped(f"{str(stop) or 'stopped'}; {again}") from None
        run_controls(study, out, resources, console)
        page = build(out)
    say(summary(out))
    say(f"run: {out}")
    say(f"report: {page}")
    _fail_if_failed([out])


def ablate_study(
    file: Path | None,
    strategies: str,
    out: Path | None,
    dry_run: bool,
    options: dict[str, Any],
    assignments: Sequence[str],
    plugins: Sequence[str],
    disable: Sequence[str],
) -> None:
    """Arms x seeds, then the report."""
    if (file is None) == (not strategies):
        raise UserError("give a study file, or --strategies a,b,a+b (one of the two)")
    with terminal() as console:
        if file is not None:
            values = read_values(file)
            if is_original(values):
                flat = _original(values, str(file), console)
                values = {"study": flat, "arm": [{key: flat.pop(key) for key in ("strategies", "objectives")}]}
            _check_tables(values, str(file))
        else:
            named = [[name.strip() for name in arm.split("+")] for arm in strategies.split(",")]
            if not all(all(arm) for arm in named):
                raise UserError(f"--strategies {strategies!r} has an empty name; expected a,b,a+b")
            arms = [{"strategies": arm} for arm in named]
            values = {"study": {"name": "ablation"}, "arm": arms}
        shared = with_overrides({**values.get("study", {}), **options}, assignments)
        values = {"study": _with_plugins(_located(shared, file), plugins), "arm": values.get("arm", [])}
        catalogue = catalogue_of(values["study"].get("plugins", []), disable, console)
        _study(values, out, catalogue, console, dry_run=dry_run, where=str(file or "ablate"))


def adapters(catalogue: Catalogue) -> list[str]:
    """Names of the strategies that edit the signal."""
    return [
        name
        for name in catalogue.strategies
        if any(hasattr(catalogue.strategies[name], hook) for hook in ("before_vq", "after_vq"))
    ]


def _study(
    values: dict[str, Any],
    out: Path | None,
    catalogue: Catalogue,
    console: Console,
    *,
    dry_run: bool = False,
    where: str = "study",
) -> None:
    study, arms, rates = compose(values["study"], values["arm"], where)
    if not arms:
        raise UserError(f"{where} has no [[arm]]; expected at least one, with strategies = [...]")
    _check_names(arms, catalogue)
    out = out or Path("runs") / study.name
    resources = StudyResources(study, catalogue, console=console)
    if dry_run:
        say(describe_plan(study, arms, rates, resources))
        return
    check_study(out, study, arms, rates, resources)
    write_study(out, study, arms, resources, to_toml(values))
    try:
        if rates:
            arms = choose_rates(study, arms, rates, out, resources, console)
        folders = {(arm.title, seed): out / arm.title / f"seed{seed}" for arm in arms for seed in study.seeds}
        wrong = shuffled_arm(study, arms)
        beside = {(arm.title, study.seeds[0]): out / "controls" / arm.title for arm in wrong}
        run_arms(study, [*arms, *wrong], folders | beside, resources, console, controls=out)
        run_controls(study, out, resources, console)
    except KeyboardInterrupt as stop:
        raise Stopped(f"{str(stop) or 'stopped'}; give the same command again to go on in {out}") from None
    console.line("writing the report")
    page = build(out)
    say(summary(out))
    say(f"report: {page}")
    if all(result_status(folder) == "failed" for folder in folders.values()):
        raise UserError(f"every run of the study failed; {page} says why")


def stored_run(folder: Path) -> tuple[StudySettings, ArmSettings]:
    """The settings of the run at `folder`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        study = StudySettings(**{**config["study"], "seeds": [config["seed"]]})
        return study, ArmSettings(**config["arm"])
    except FileNotFoundError:
        raise UserError(
            f"no run at {folder}: it has no config.json; expected a folder written by runner train"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no configuration of a run: {' '.join(str(error).split())[:200]}") from error


def _check_tables(values: dict[str, Any], where: str) -> None:
    """That a study file has a [study] and [[arm]]s, and nothing else."""
    for key in values:
        if key not in ("study", "arm"):
            raise UserError(f"{where}: unknown key {key!r} outside of its tables; expected [study] and [[arm]]")
    if not isinstance(values.get("study", {}), dict):
        raise UserError(f"{where}: study = {values['study']!r}; expected a table, [study]")
    arms = values.get("arm", [])
    if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
        raise UserError(f"{where}: arm is no list of tables; expected [[arm]], with two brackets, for every arm")


def _original(values: dict[str, Any], where: str, console: Console) -> dict[str, Any]:
    """Settings of an original phase 3, 4 or 6 file as those of today; others as they are."""
    if not is_original(values):
        return values
    settings, remarks = translated(values, where)
    for remark in remarks:
        console.warning(remark)
    return settings


def _located(shared: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """The data's place as an absolute path: relative to the working folder, else to the folder of the settings file."""
    data = shared.get("data")
    if not isinstance(data, str) or not data:
        return shared
    places = [Path(data), *([file.parent / data] if file else [])]
    return {**shared, "data": str(next((p for p in places if p.exists()), places[0]).resolve())}


def _with_plugins(shared: dict[str, Any], plugins: Sequence[str]) -> dict[str, Any]:
    given = shared.get("plugins", [])
    if not isinstance(given, list) or not all(isinstance(file, str) for file in given):
        raise UserError(f"plugins = {given!r}; expected a list of files: ['my_strategy.py']")
    files = [*given, *plugins]
    return {**shared, "plugins": files} if files else dict(shared)


def _check_names(arms: Sequence[ArmSettings], catalogue: Catalogue) -> None:
    """Name an unknown strategy or setting before anything is loaded."""
    from snac_core.settings import validated

    for arm in arms:
        for name in arm.all_strategies:
            validated(catalogue.strategies[name], arm.settings.get(name, {}))


def _fail_if_failed(folders: Sequence[Path]) -> None:
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        if result["status"] == "failed":
            raise UserError(f"the run failed: {result['error']} (see {folder / 'training.log'})")


Strategy = Annotated[list[str], typer.Option("--strategy", help="Strategy; give it again to add another.")]
Strategies = Annotated[str, typer.Option(help="Arms, separated by commas; a+b is one arm with two strategies.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="Folder of speech, or a manifest.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="Codec: tiny, a folder, or a hub id.", show_default=False)]
Teacher = Annotated[str | None, typer.Option(help="Speaker encoder of conditioning and loss.", show_default=False)]
Judge = Annotated[str | None, typer.Option(help="Speaker encoder of the scores.", show_default=False)]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:N.", show_default=False)]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default=False)]
Set = Annotated[
    list[str], typer.Option("--set", help="key=value of any setting, e.g. --set lr=3e-4 --set NAME.key=value.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: runner quickstart")(quickstart)
    app.command(epilog="Example: runner train --strategy NAME --data speech/ (runner plugins lists the names)")(train)
    app.command(epilog="Example: runner ablate --strategies NAME1,NAME2,NAME1+NAME2 --data speech/ --seeds 2")(ablate)
    app.command(epilog="Example: runner report runs/quickstart")(report)


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each arm.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 2,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train every adapter that is installed side by side on synthetic speech, and write the comparative report."""

    quick(out, steps, seeds, plugin, disable_plugin)


def train(
    strategy: Strategy = [],  # noqa: B006
    config: Annotated[Path | None, typer.Option(help="Settings as TOML, or JSON.", show_default=False)] = None,
    out: Out = None,
    data: Data = None,
    base: Base = None,
    speaker_encoder: Teacher = None,
    judge: Judge = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", show_default=False)] = None,
    device: Device = None,
    save_every: SaveEvery = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.", show_default=False)] = None,
    set_: Set = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train one arm, judge it on test speakers, and write its run folder."""

    options = _given(data=data, base=base, speaker_encoder=speaker_encoder, judge=judge, steps=steps, device=device,
                     save_every=save_every, seeds=None if seed is None else [seed])  # fmt: skip
    train_one(strategy, config, out, resume, options, set_, plugin, disable_plugin)


def ablate(
    study: Annotated[Path | None, typer.Argument(help="Study file (TOML).", show_default=False)] = None,
    strategies: Strategies = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each arm.", show_default=False)] = None,
    out: Out = None,
    data: Data = None,
    base: Base = None,
    speaker_encoder: Teacher = None,
    judge: Judge = None,
    steps: Steps = None,
    device: Device = None,
    save_every: SaveEvery = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it costs.")] = False,
    set_: Set = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train arms side by side for every seed, and write the comparative report. Goes on with what is unfinished."""

    options = _given(data=data, base=base, speaker_encoder=speaker_encoder, judge=judge, steps=steps, device=device,
                     save_every=save_every, seeds=None if seeds is None else list(range(seeds)))  # fmt: skip
    ablate_study(study, strategies, out, dry_run, options, set_, plugin, disable_plugin)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Study folder, or a run's; several make a leaderboard.")],
    votes: Annotated[
        list[Path], typer.Option(help="Votes that abx.html exported; may be repeated.", show_default=False)
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of a leaderboard.")] = Path("leaderboard"),
) -> None:
    """Write report.html, .md, .json and tables from result files: of a study, or of several that can be compared."""
    from snac_core.errors import UserError
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


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
