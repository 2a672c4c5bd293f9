"""What `train`, `ablate` and `quickstart` do, from their options to the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.cli.console import Stopped, progress, say
from runner.cli.plugin_options import catalogue_of
from runner.config import ArmSettings, StudySettings, compose, read_values, to_toml, with_overrides
from runner.materials import Materials
from runner.original_settings import is_original, translated
from runner.planning import describe_plan
from runner.rates import choose_rates
from runner.report import build, summary
from runner.runs import result_status
from runner.study import Console, check_study, run_arms, run_controls, shuffled_arm, write_study
from snac_core.errors import UserError
from snac_core.plugins import Catalogue


def quick(out: Path, steps: int, seeds: int, plugins: Sequence[str] = (), disable: Sequence[str] = ()) -> None:
    """Every placement side by side on speech made here; the report at the end."""
    from runner.data import synthesize

    with progress() as console:
        catalogue = catalogue_of(plugins, disable, console.line)
        speech = synthesize(
            out / "speech", speakers=40, sentences=12,
            progress=lambda done, of: console.step("speaking", done, of, ""),
        )  # fmt: skip
        values = {
            "study": {
                "name": "quickstart", "data": str(speech), "seeds": list(range(seeds)), "steps": steps,
                "crop_seconds": 0.96, "test_pairs": 16, "dev_pairs": 6, "pair_seconds": 3.0,
                "without": ["wer", "cer"],  # slow, and no use on these voices; phones are read instead
                "shuffled": False,  # a control that costs as much as an arm
                "plugins": list(plugins),
            },
            "arm": [{"strategies": [name]} for name in placements(catalogue)],
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
    with progress() as console:
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
                known = ", ".join(placements(catalogue_of(plugins, disable, console.line)))
                raise UserError(f"no strategy; give --strategy NAME, one of: {known}")
            values = with_overrides({**values, **options}, assignments)
            arm_keys = {key: value for key, value in values.items() if key not in StudySettings.model_fields}
            shared = _located({k: v for k, v in values.items() if k in StudySettings.model_fields}, config)
            study, arms, _ = compose(_with_plugins(shared, plugins), [arm_keys], str(config or "train"))
            arm = arms[0]
            if len(study.seeds) != 1:
                raise UserError(f"train makes one run; got seeds {list(study.seeds)}; runner ablate makes several")
        catalogue = catalogue_of(dict.fromkeys([*study.plugins, *plugins]), disable, console.line)
        seed = study.seeds[0]
        out = out or Path("runs") / study.name / arm.title / f"seed{seed}"
        materials = materials_of(study, catalogue, console)
        _check_names([arm], catalogue)
        try:
            run_arms(study, [arm], {(arm.title, seed): out}, materials, console, controls=out)
        except KeyboardInterrupt as stop:
            begun = (out / "config.json").is_file()
            again = f"go on with: runner train --resume {out}" if begun else "nothing was trained yet"
            raise Stopped(f"{str(stop) or 'stopped'}; {again}") from None
        run_controls(study, out, materials, console)
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
    with progress() as console:
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
        catalogue = catalogue_of(values["study"].get("plugins", []), disable, console.line)
        _study(values, out, catalogue, console, dry_run=dry_run, where=str(file or "ablate"))


def placements(catalogue: Catalogue) -> list[str]:
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
    materials = materials_of(study, catalogue, console)
    if dry_run:
        say(describe_plan(study, arms, rates, materials))
        return
    check_study(out, study, arms, rates, materials)
    write_study(out, study, arms, materials, to_toml(values))
    try:
        if rates:
            arms = choose_rates(study, arms, rates, out, materials, console)
        folders = {(arm.title, seed): out / arm.title / f"seed{seed}" for arm in arms for seed in study.seeds}
        wrong = shuffled_arm(study, arms)
        beside = {(arm.title, study.seeds[0]): out / "controls" / arm.title for arm in wrong}
        run_arms(study, [*arms, *wrong], folders | beside, materials, console, controls=out)
        run_controls(study, out, materials, console)
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
        console.line(f"warning: {remark}")
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


def materials_of(study: StudySettings, catalogue: Catalogue, console: Console) -> Materials:
    """What a study works with, telling the console of long work."""
    return Materials(
        study, catalogue,
        progress=lambda title, done, of: console.step(title, done, of, ""),
        warn=lambda text: console.line(f"warning: {text}"),
    )  # fmt: skip


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
