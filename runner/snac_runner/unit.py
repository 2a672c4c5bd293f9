"""The unit of work of a study: arms of one seed, which train side by side and are then evaluated one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from snac_core.checkpoint import state_of
from snac_core.errors import UserError
from snac_core.files import remove_unfinished, write_json
from snac_core.plugin_guard import describe_error
from snac_runner.arm import Arm
from snac_runner.config import ArmSettings
from snac_runner.controls import evaluate_system, informative_metrics, run_controls
from snac_runner.distributed import ProcessLost
from snac_runner.evaluate.model_figures import noise_floor, times_real_time
from snac_runner.evaluate.scoring import WORST
from snac_runner.evaluate.systems import conditioned, evaluating, needed_outputs
from snac_runner.resources import StudyResources
from snac_runner.run_folder import run_config
from snac_runner.run_result import Result, evaluation, write_result
from snac_runner.train import preflight, train_side_by_side


@dataclass(frozen=True)
class Unit:
    """Runs of one seed that are not finished.

    Attributes:
        seed: of all runs.
        arms: what to train.
        folders: arm title to the run folder.
        controls: the folder to evaluate the controls into, before the first arm is evaluated; None: no controls.
        test: whether the arms are evaluated on the test split.
    """

    seed: int
    arms: tuple[ArmSettings, ...]
    folders: Mapping[str, Path]
    controls: Path | None
    test: bool


Execute = Callable[[Sequence[Unit], StudyResources], None]
"""What runs the units of a study: one after the other, or on a cluster."""


def run_in_turn(units: Sequence[Unit], resources: StudyResources) -> None:
    """Run units one after the other, in this process."""
    for unit in units:
        run_unit(unit, resources)


def run_unit(unit: Unit, resources: StudyResources) -> None:
    """Train and evaluate the runs of a unit, from their checkpoints on, and write their results.

    Raises:
        UserError: if an arm cannot learn.
        Interrupted: on Ctrl-C; what was done so far is kept and can be resumed.
    """
    trained = train_unit(unit, resources)
    if unit.test and unit.controls is not None and trained:
        run_controls(unit.controls, resources)
    for arm, result in trained:
        if resources.context.first:
            arm.model.save_pretrained(arm.folder / "model")
        if unit.test:
            evaluate_arm(arm, result, unit.controls)
        _write(result, resources)


def train_unit(unit: Unit, resources: StudyResources) -> list[tuple[Arm, Result]]:
    """Train the runs of a unit, from their checkpoints on, and write the results of those that fail.

    Returns:
        the trained arms, and their results, which are not complete.

    Raises:
        UserError, Interrupted: see `run_unit`.
    """
    results = [
        Result(
            unit.folders[arm.title], arm.title, "control" if arm.shuffled_speakers else "arm", unit.seed, arm,
            run_config(arm, unit.seed, resources),
        )
        for arm in unit.arms
    ]  # fmt: skip
    arms = [_prepared(arm, unit.seed, unit.folders[arm.title], resources) for arm in unit.arms]
    for arm, result in zip(arms, results, strict=True):
        if resources.context.first:
            remove_unfinished(arm.folder)
            write_json(arm.folder / "config.json", result.config)
    try:
        failures = train_side_by_side(arms, resources)
    except KeyboardInterrupt:
        for arm, result in zip(arms, results, strict=True):
            result.status, result.cost = "cancelled", cost_of(arm)
            result.error = f"interrupted at step {arm.progress.step} of {resources.study.steps}"
            write_result(result, resources)
        raise
    trained = []
    for arm, result in zip(arms, results, strict=True):
        result.cost = cost_of(arm)
        if result.arm in failures:
            result.status, result.error = "failed", failures[result.arm]
            _write(result, resources)
        else:
            trained.append((arm, result))
    return trained


def _write(result: Result, resources: StudyResources) -> None:
    """Write a result, and say if it is a failure."""
    if result.status == "failed":
        resources.console.line(f"{result.arm}, seed {result.seed}: failed: {result.error}")
    write_result(result, resources)


def _prepared(settings: ArmSettings, seed: int, folder: Path, resources: StudyResources) -> Arm:
    """An arm from its checkpoint, or a new one. With the first seed, a new one has passed the preflight checks."""
    try:
        arm = Arm.new(settings, seed, folder, resources)
        if not arm.load() and seed == resources.study.seeds[0]:  # other seeds differ in initial values only
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
                result, lambda _: conditioned(arm.model, outputs=needed_outputs(selection.metrics.values())),
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
