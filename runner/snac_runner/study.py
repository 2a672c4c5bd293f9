"""A study: arms x seeds into run folders, with the controls beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from snac_core.errors import UserError
from snac_core.files import parse_json, write_json, write_text
from snac_runner.config import SCHEMA, SHUFFLED, ArmSettings
from snac_runner.controls import (
    CONTROLS,
    check_metric_names,
    check_versions,
    run_controls,
    wanted_metrics,
)
from snac_runner.data.pairs import PairList
from snac_runner.external import evaluate_adapters, load_adapters
from snac_runner.lock import locked
from snac_runner.logs import read_metrics
from snac_runner.resources import StudyResources
from snac_runner.run_folder import (
    CHECKPOINT,
    check_folder,
    check_study_schema,
    read_result,
    result_status,
    run_config,
)
from snac_runner.run_result import compared_values
from snac_runner.unit import Execute, Unit, run_in_turn

Runs = dict[tuple[str, int], Path]
"""(arm title, seed) to the run folder."""


def run_study(
    folder: Path,
    arms: Sequence[ArmSettings],
    rates: Sequence[float],
    resources: StudyResources,
    text: str,
    execute: Execute = run_in_turn,
) -> list[Path]:
    """Run a study into `folder`; finished runs are kept, unfinished ones resumed.

    Args:
        folder: of the study.
        arms: what to compare.
        rates: learning rates to choose from, for each arm; empty: each arm's own.
        resources: of the study.
        text: the study as TOML, for study.toml.
        execute: runs the units.

    Returns:
        the run folders of the arms.

    Raises:
        UserError: if the folder holds something else, or another command is running it; see `check_study` and
            `run_arms`.
        KeyboardInterrupt: on Ctrl-C; what was done so far is kept.
    """
    resources.check(choose_rates=bool(rates))
    resources.context.check_equal(compared_values(arms, resources))
    with ExitStack() as until_the_end:

        def begin() -> None:
            check_study(folder, arms, rates, resources)
            until_the_end.enter_context(locked(folder, "is running the study in"))
            write_study(folder, arms, resources, text)

        resources.context.first_decides(begin)
        return _run(folder, arms, rates, resources, execute)


def _run(
    folder: Path,
    arms: Sequence[ArmSettings],
    rates: Sequence[float],
    resources: StudyResources,
    execute: Execute,
) -> list[Path]:
    """The part of `run_study` for which the folder is locked."""
    adapters = load_adapters(folder, [arm.title for arm in arms], resources)  # what cannot be used is an error now
    if rates:
        arms = choose_rates(arms, rates, folder, resources, execute)
    study = resources.study
    runs = {(arm.title, seed): folder / arm.title / f"seed{seed}" for arm in arms for seed in study.seeds}
    control_arms = [shuffled_arm(arms[0])] if study.shuffled_control else []
    control_runs = {(arm.title, study.seeds[0]): folder / "controls" / arm.title for arm in control_arms}
    run_arms([*arms, *control_arms], runs | control_runs, resources, controls=folder, execute=execute)
    run_controls(folder, resources)
    evaluate_adapters(adapters, resources)
    return list(runs.values())


def run_arms(
    arms: Sequence[ArmSettings],
    runs: Runs,
    resources: StudyResources,
    *,
    controls: Path | None = None,
    test: bool = True,
    execute: Execute = run_in_turn,
) -> None:
    """Train and evaluate every run that is not finished, the arms of a seed side by side; finished runs are kept.

    Args:
        arms: what to train.
        runs: the run folders.
        resources: of the study.
        controls: the folder to evaluate the controls into, before the first arm is evaluated; None: no controls.
        test: False: train only, and do not use the test split. The same if the study has no test conversions.
        execute: runs the units.

    Raises:
        UserError: if a folder holds a run of another configuration (nothing is trained then), or an arm cannot learn.
        Interrupted: on Ctrl-C; what was done so far is kept and can be resumed.
    """
    check_metric_names(resources)
    resources.check()
    test = test and len(resources.test_pairs) > 0
    if test:
        metrics, _ = wanted_metrics(resources)  # a recogniser that cannot be used is an error before any training
        if controls is not None:
            resources.context.first_decides(partial(check_versions, controls, metrics, resources))
    by_title = {arm.title: arm for arm in arms}
    context = resources.context
    context.check_equal(compared_values(arms, resources))
    _ = resources.parts  # a batch that cannot be divided among the processes is an error
    configs = {key: run_config(by_title[key[0]], key[1], resources) for key in runs}
    states = context.first_decides(lambda: {key: check_folder(folder, configs[key]) for key, folder in runs.items()})
    for (title, seed), state in states.items():
        if state in ("success", "failed"):
            resources.console.line(f"{title}, seed {seed}: already finished ({state})")
    units = [
        Unit(seed, tuple(unfinished), {arm.title: runs[arm.title, seed] for arm in unfinished}, controls, test)
        for seed in resources.study.seeds
        if (unfinished := [arm for arm in arms if states.get((arm.title, seed)) in ("new", "unfinished")])
    ]
    if units:
        execute(units, resources)


def shuffled_arm(arm: ArmSettings) -> ArmSettings:
    """An arm that is trained under the embeddings of wrong speakers: a control."""
    return arm.model_copy(update={"name": SHUFFLED, "shuffled_speakers": True})


def check_study(folder: Path, arms: Sequence[ArmSettings], rates: Sequence[float], resources: StudyResources) -> None:
    """Check that this study can be written into `folder`; writes nothing.

    Raises:
        UserError: if the folder holds other files, a study of another version, other conversions, controls of another
            base or judge, or a run of another configuration.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder of a study, or a new folder, with --out")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if present - {"study.toml"} and "study.json" not in present:
        raise UserError(f"{folder} holds files that are not a study; give a new folder with --out")
    check_study_schema(folder)
    stored = folder / "pairs.json"
    if stored.is_file() and PairList.load(stored).digest != resources.test_pairs.digest:
        raise UserError(f"{folder} holds a study of other conversions (pairs.json); give a new folder with --out")
    digests = resources.digests
    for name in CONTROLS:
        control = read_result(folder / "controls" / name)
        found = control.get("digests", digests)
        judges = [judge["name"] for judge in control.get("judges", [])]
        asked = [judge.name for judge in resources.judges]
        if control and judges != asked:
            raise UserError(
                f"{folder} holds a study judged by {', '.join(judges)}, and this one is judged by {', '.join(asked)}; "
                "give a new folder with --out"
            )
        for what in ("base", "speaker_encoder", "judge"):
            if found.get(what) != digests[what]:
                raise UserError(
                    f"{folder} holds a study with another {what} (digest {str(found.get(what))[:12]}; this one has "
                    f"{digests[what][:12]}); give a new folder with --out"
                )
    for arm in arms if not rates else ():
        for seed in resources.study.seeds:
            check_folder(folder / arm.title / f"seed{seed}", run_config(arm, seed, resources))


def write_study(folder: Path, arms: Sequence[ArmSettings], resources: StudyResources, text: str) -> None:
    """Write study.json, by which `check_study` knows the folder of a study, then study.toml and pairs.json."""
    study, pairs = resources.study, resources.test_pairs
    write_json(
        folder / "study.json",
        {
            "schema": SCHEMA,
            "name": study.name,
            "title": study.name,
            "seeds": list(study.seeds),
            "arms": [arm.title for arm in arms],
            "speaker_encoder": study.speaker_encoder,
            "judges": list(study.judges),
            "pairs": {"digest": pairs.digest, "n": len(pairs)},
        },
    )
    write_text(folder / "study.toml", text)
    pairs.export(folder / "pairs.json")


def choose_rates(
    arms: Sequence[ArmSettings],
    rates: Sequence[float],
    folder: Path,
    resources: StudyResources,
    execute: Execute = run_in_turn,
) -> list[ArmSettings]:
    """Give each arm the learning rate with the best dev score, from one trial per rate on the first seed.

    The trials are trained like any run, under trials/, and are not evaluated on test speakers: only the chosen trial
    is, as the arm's run of that seed.

    Raises:
        UserError: if an arm fails with every rate.
    """
    study, seed = resources.study, resources.study.seeds[0]
    trials = {
        (arm.title, rate): arm.model_copy(update={"name": f"{arm.title} lr={rate:g}", "lr": rate})
        for arm in arms
        for rate in rates
    }
    runs = {(trial.title, seed): folder / "trials" / trial.title / f"seed{seed}" for trial in trials.values()}
    run_arms(list(trials.values()), runs, resources, test=False, execute=execute)
    chosen = []
    for arm in arms:
        scores = {}
        for rate in rates:
            place = runs[trials[arm.title, rate].title, seed]
            on_dev = [record["dev"]["score"] for record in read_metrics(place / "metrics.jsonl") if "dev" in record]
            if result_status(place) == "success" and on_dev:
                scores[rate] = min(on_dev) if study.select == "best" else on_dev[-1]
        scores = resources.context.agree(scores)
        if not scores:
            raise UserError(
                f"arm {arm.title!r} failed with every learning rate of {list(rates)}; see {folder / 'trials'}"
            )
        best = min(scores, key=scores.__getitem__)
        listed = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in scores.items())
        resources.console.line(f"{arm.title}: lr {best:g} by dev score ({listed})")
        chosen.append(arm.model_copy(update={"lr": best}))
        if resources.context.first:
            _adopt(runs[trials[arm.title, best].title, seed], folder / arm.title / f"seed{seed}", chosen[-1])
    return chosen


def continue_longer(run: Path, folder: Path, config: dict[str, Any]) -> None:
    """Copy a run's checkpoint and log into a new folder, to be trained to more steps; the run stays as it is.

    Args:
        run: the folder of the run.
        folder: the new folder. If it continues this run already, nothing is copied.
        config: of the longer run; see `run_config`.

    Raises:
        UserError: if the run has no checkpoint or has as many steps already, or other data, base or encoders.
    """
    stored = parse_json((run / "config.json").read_text())
    steps, more = stored["study"]["steps"], config["study"]["steps"]
    if more < steps:
        raise UserError(f"{run} is a run of {steps} steps; --steps {more} is fewer; expected more than {steps}")
    for what, digest in stored["digests"].items():
        if config["digests"].get(what) != digest:
            raise UserError(f"{run} was trained with another {what} (digest {digest[:12]}; this one has "
                            f"{str(config['digests'].get(what))[:12]})")  # fmt: skip
    for name, digest in stored.get("plugin_files", {}).items():
        if config["plugin_files"].get(name) != digest:
            raise UserError(f"the plugin file of {name} has changed since {run} was trained; train a new run, or put "
                            "the file back")  # fmt: skip
    if not (run / CHECKPOINT).is_file():
        raise UserError(f"{run} has no checkpoint to continue from; expected {run / CHECKPOINT}")
    if check_folder(folder, config) != "new":
        return
    working = folder.with_name(f".{folder.name}.continued")
    shutil.rmtree(working, ignore_errors=True)
    (working / CHECKPOINT).parent.mkdir(parents=True)
    for name in (CHECKPOINT, Path("metrics.jsonl")):
        shutil.copy2(run / name, working / name)
    write_json(working / "config.json", config)
    if folder.exists():
        folder.rmdir()  # empty, as check_folder has found
    working.replace(folder)


def _adopt(trial: Path, folder: Path, arm: ArmSettings) -> None:
    """Copy a trained trial to be the arm's run of its seed, not evaluated yet; training again would give the same."""
    if folder.exists():
        return
    working = folder.with_name(f".{folder.name}.adopted")
    shutil.rmtree(working, ignore_errors=True)
    shutil.copytree(trial, working, ignore=shutil.ignore_patterns("result.json"))
    config = parse_json((working / "config.json").read_text())
    config["arm"]["name"] = arm.name
    write_json(working / "config.json", config)
    working.replace(folder)
