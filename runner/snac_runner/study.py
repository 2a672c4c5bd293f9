"""A study: arms x seeds into run folders, with the controls beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save

from snac_core.checkpoint import state_of
from snac_core.errors import UserError
from snac_core.files import write_json, write_text
from snac_core.plugin_guard import describe_error
from snac_runner.arm import Arm
from snac_runner.config import SCHEMA, SHUFFLED, ArmSettings
from snac_runner.controls import (
    CONTROLS,
    check_metric_names,
    check_versions,
    evaluate_system,
    informative_metrics,
    run_controls,
    wanted_metrics,
)
from snac_runner.data.pairs import PairList
from snac_runner.distributed import ProcessLost
from snac_runner.evaluate.model_figures import noise_floor, times_real_time
from snac_runner.evaluate.scoring import WORST
from snac_runner.evaluate.systems import conditioned, evaluating, needed_outputs
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
from snac_runner.run_result import Result, evaluation, versions, write_result
from snac_runner.train import preflight, train_side_by_side

Runs = dict[tuple[str, int], Path]
"""(arm title, seed) to the run folder."""


def run_study(
    folder: Path, arms: Sequence[ArmSettings], rates: Sequence[float], resources: StudyResources, text: str
) -> list[Path]:
    """Run a study into `folder`; finished runs are kept, unfinished ones resumed.

    Args:
        folder: of the study.
        arms: what to compare.
        rates: learning rates to choose from, for each arm; empty: each arm's own.
        resources: of the study.
        text: the study as TOML, for study.toml.

    Returns:
        the run folders of the arms.

    Raises:
        UserError: if the folder holds something else; see `check_study` and `run_arms`.
        KeyboardInterrupt: on Ctrl-C; what was done so far is kept.
    """
    resources.check(choose_rates=bool(rates))
    check_processes(arms, resources)

    def begin() -> None:
        check_study(folder, arms, rates, resources)
        write_study(folder, arms, resources, text)

    resources.context.first_decides(begin)
    if rates:
        arms = choose_rates(arms, rates, folder, resources)
    study = resources.study
    runs = {(arm.title, seed): folder / arm.title / f"seed{seed}" for arm in arms for seed in study.seeds}
    control_arms = [shuffled_arm(arms[0])] if study.shuffled_control else []
    control_runs = {(arm.title, study.seeds[0]): folder / "controls" / arm.title for arm in control_arms}
    run_arms([*arms, *control_arms], runs | control_runs, resources, controls=folder)
    run_controls(folder, resources)
    return list(runs.values())


def run_arms(
    arms: Sequence[ArmSettings],
    runs: Runs,
    resources: StudyResources,
    *,
    controls: Path | None = None,
    test: bool = True,
) -> None:
    """Train and evaluate every run that is not finished, the arms of a seed side by side; finished runs are kept.

    Args:
        arms: what to train.
        runs: the run folders.
        resources: of the study.
        controls: the folder to evaluate the controls into, before the first arm is evaluated; None: no controls.
        test: False: train only, and do not use the test split. The same if the study has no test conversions.

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
    check_processes(arms, resources)
    _ = resources.parts  # a batch that cannot be divided among the processes is an error
    configs = {key: run_config(by_title[key[0]], key[1], resources) for key in runs}
    states = context.first_decides(lambda: {key: check_folder(folder, configs[key]) for key, folder in runs.items()})
    for (title, seed), state in states.items():
        if state in ("success", "failed"):
            resources.console.line(f"{title}, seed {seed}: already finished ({state})")
    for seed in resources.study.seeds:
        unfinished = [arm for arm in arms if states.get((arm.title, seed)) in ("new", "unfinished")]
        if not unfinished:
            continue
        results = [
            Result(
                runs[arm.title, seed], arm.title, "control" if arm.shuffled_speakers else "arm", seed, arm,
                configs[arm.title, seed],
            )
            for arm in unfinished
        ]  # fmt: skip
        trained = [_prepared(settings, seed, runs[settings.title, seed], resources) for settings in unfinished]
        for arm, result in zip(trained, results, strict=True):
            if context.first:
                write_json(arm.folder / "config.json", result.config)
        try:
            failures = train_side_by_side(trained, resources)
        except KeyboardInterrupt:
            for arm, result in zip(trained, results, strict=True):
                result.status, result.cost = "cancelled", cost_of(arm)
                result.error = f"interrupted at step {arm.progress.step} of {resources.study.steps}"
                write_result(result, resources)
            raise
        if test and controls is not None and len(failures) < len(trained):
            run_controls(controls, resources)
        for arm, result in zip(trained, results, strict=True):
            result.cost = cost_of(arm)
            if result.arm in failures:
                result.status, result.error = "failed", failures[result.arm]
            else:
                if context.first:
                    arm.model.save_pretrained(arm.folder / "model")
                if test:
                    evaluate_arm(arm, result, controls)
            if result.status == "failed":
                resources.console.line(f"{result.arm}, seed {seed}: failed: {result.error}")
            write_result(result, resources)


def _prepared(settings: ArmSettings, seed: int, folder: Path, resources: StudyResources) -> Arm:
    """An arm from its checkpoint, or a new one that has passed the preflight checks."""
    try:
        arm = Arm.new(settings, seed, folder, resources)
        if not arm.load():
            preflight(arm)
    except (UserError, OSError, ProcessLost):
        raise
    except Exception as error:  # raised by a plugin
        raise UserError(f"arm {settings.title!r} cannot start: {describe_error(error)}") from error
    return arm


def evaluate_arm(arm: Arm, result: Result, controls: Path | None) -> None:
    """Score a trained arm on the test conversions, and write the figures on its model card; fills in `result`."""
    resources = arm.resources
    try:
        selection = informative_metrics(controls, resources)
        with evaluating(arm.model):
            scores = evaluate_system(
                result, conditioned(arm.model, outputs=needed_outputs(selection.metrics.values())),
                {"run": result.config["hash"]}, resources, selection, worst=WORST if resources.study.samples else 0,
            )  # fmt: skip
        if not resources.context.first:
            return
        floor = noise_floor(arm.model, resources.test, resources.catalogue.metrics["secs"]())
        speed = times_real_time(arm.model, resources.test)
    except (OSError, ProcessLost):
        raise
    except Exception as error:  # e.g. a strategy that cannot process the length of a test utterance
        result.status, result.error = "failed", f"in evaluation: {describe_error(error)}"
        return
    result.scores, result.noise_floor, result.cost["times_real_time"] = scores, {"secs": floor}, speed
    arm.model.evaluation = evaluation(arm.model, result.scores, resources, seed=arm.seed, steps=arm.progress.step)
    arm.model.save_pretrained(arm.folder / "model")  # again, for the model card


def cost_of(arm: Arm) -> dict[str, Any]:
    """What a run took: time in s (as if alone = shared + own), steps, trainable parameters, bytes, memory in bytes."""
    progress = arm.progress
    return {
        "seconds_alone": progress.seconds_own + progress.seconds_shared,
        "seconds_own": progress.seconds_own,
        "seconds_shared": progress.seconds_shared,
        "steps": progress.step,
        "parameters": sum(parameter.numel() for _, parameter in arm.model.trained_parameters()),
        "bytes": len(save(state_of(arm.model.attached))),
        "peak_memory_bytes": progress.peak_memory or None,
        "times_real_time": None,
    }


def check_processes(arms: Sequence[ArmSettings], resources: StudyResources) -> None:
    """Raise UserError unless all processes that train together have the same data, versions and settings."""
    config = run_config(arms[0], resources.study.seeds[0], resources)
    settings = [config["study"], *(arm.model_dump(mode="json") for arm in arms)]
    files = {f"plugin file of {name}": str(digest) for name, digest in config["plugin_files"].items()}
    of_arm = versions(resources, arms[0])
    plugins = {f"version of {name}": str(about["version"]) for name, about in of_arm.pop("plugins").items()}
    resources.context.check_equal(
        {
            **{f"version of {name}": str(version) for name, version in of_arm.items()},
            **plugins,
            **files,
            **{f"digest of {name}": digest for name, digest in resources.digests.items()},
            "settings": json.dumps(settings, sort_keys=True),
        }
    )


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
    """Write study.toml, study.json and pairs.json; see check_study."""
    study, pairs = resources.study, resources.test_pairs
    pairs.export(folder / "pairs.json")
    write_text(folder / "study.toml", text)
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


def choose_rates(
    arms: Sequence[ArmSettings], rates: Sequence[float], folder: Path, resources: StudyResources
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
    run_arms(list(trials.values()), runs, resources, test=False)
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
    stored = json.loads((run / "config.json").read_text())
    steps, more = stored["study"]["steps"], config["study"]["steps"]
    if more < steps:
        raise UserError(f"{run} is a run of {steps} steps; --steps {more} is fewer; expected more than {steps}")
    for what, digest in stored["digests"].items():
        if config["digests"].get(what) != digest:
            raise UserError(f"{run} was trained with another {what} (digest {digest[:12]}; this one has "
                            f"{str(config['digests'].get(what))[:12]})")  # fmt: skip
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
    config = json.loads((working / "config.json").read_text())
    config["arm"]["name"] = arm.name
    write_json(working / "config.json", config)
    working.replace(folder)
