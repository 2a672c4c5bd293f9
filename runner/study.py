"""A study: arms x seeds into run folders, the controls beside them, the report at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from runner.arm import Arm
from runner.config import ArmSettings, StudySettings
from runner.controls import CONTROLS, Console, fit_metrics, judged, run_controls, shuffled_arm
from runner.data import PairList
from runner.evaluate.noise import noise_floor
from runner.evaluate.pace import times_real_time
from runner.evaluate.stating import evaluation
from runner.evaluate.systems import conditioned
from runner.materials import Materials
from runner.preflight import preflight
from runner.runs import check_folder, now, peak_memory, read_result, run_config, write_result
from runner.train import Interrupted, train_side_by_side
from snac_core import atomic
from snac_core.checkpoint import state_of
from snac_core.containment import described
from snac_core.errors import UserError

WORST = 10  # conversions least like their target whose audio is kept for the report


def run_arms(
    study: StudySettings,
    arms: Sequence[ArmSettings],
    folders: dict[tuple[str, int], Path],
    materials: Materials,
    console: Console,
    *,
    controls: Path | None = None,
    judge: bool = True,
) -> None:
    """Train and judge every (arm, seed) of `folders` that is not finished; finished ones are left alone.

    Args:
        study: the shared settings.
        arms: what to train.
        folders: (arm, seed) to its run folder.
        materials: what they share.
        console: where to say how far it is.
        controls: the folder to judge the controls into, before the first arm is judged; None: no controls.
        judge: False: train, and hear nothing of the test split.

    Raises:
        UserError: if a folder holds a run of another configuration (nothing is trained then), or an arm cannot learn.
        Interrupted: on Ctrl-C; what was done so far is kept and goes on from there.
    """
    by_title = {arm.title: arm for arm in arms}
    configs = {key: run_config(study, by_title[key[0]], key[1], materials) for key in folders}
    states = {key: check_folder(folder, configs[key]) for key, folder in folders.items()}
    for (title, seed), state in states.items():
        if state in ("success", "failed"):
            console.line(f"{title}, seed {seed}: finished already ({state}), left as it is")
    for seed in study.seeds:
        todo = [arm for arm in arms if states.get((arm.title, seed)) in ("new", "unfinished")]
        if todo:
            _run_seed(study, todo, seed, folders, configs, materials, console, controls, judge)


def _run_seed(
    study: StudySettings,
    todo: Sequence[ArmSettings],
    seed: int,
    folders: dict[tuple[str, int], Path],
    configs: dict[tuple[str, int], dict[str, Any]],
    materials: Materials,
    console: Console,
    controls: Path | None,
    judge: bool,
) -> None:
    started = now()
    training = []
    for settings in todo:
        try:
            arm = Arm.new(settings, seed, folders[settings.title, seed], materials)
            if not arm.load():
                preflight(arm)
        except (UserError, OSError):
            raise
        except Exception as error:  # a plugin's own code
            raise UserError(f"arm {settings.title!r} cannot start: {described(error)}") from error
        training.append(arm)
    for arm in training:
        atomic.write_json(arm.folder / "config.json", configs[arm.settings.title, seed])

    def tell(step: int, steps: int, logged: dict[str, dict[str, float]]) -> None:
        shown = "  ".join(
            f"{title}: gap {values['gap']:.3f}" if "gap" in values else f"{title}: loss {values['loss']:.3f}"
            for title, values in logged.items()
        )
        console.step(f"seed {seed}: training {len(training)} arm(s) side by side", step, steps, shown)

    def finish(arm: Arm, status: str, pace: float | None = None, **extra: Any) -> None:
        title = arm.settings.title
        write_result(
            arm.folder, study=study, materials=materials, status=status, arm=title, seed=seed,
            kind="control" if arm.settings.shuffled else "arm", settings=arm.settings, config=configs[title, seed],
            cost=_cost(arm) | {"times_real_time": pace}, started=started, **extra,
        )  # fmt: skip

    try:
        failures = train_side_by_side(training, materials, tell=tell)
    except KeyboardInterrupt:
        for arm in training:
            finish(arm, "cancelled", error=f"interrupted at step {arm.progress.step} of {study.steps}")
        raise
    if judge and controls is not None and len(failures) < len(training):
        run_controls(study, controls, materials, console)
    for arm in training:
        title = arm.settings.title
        if title in failures:
            console.line(f"{title}, seed {seed}: failed: {failures[title]}")
            finish(arm, "failed", error=failures[title])
            continue
        arm.model.save_pretrained(arm.folder / "model")
        if not judge:
            finish(arm, "success")
            continue
        try:
            metrics, missing = fit_metrics(controls, materials)
            scores = judged(
                f"judging {title}, seed {seed}", conditioned(arm.model), arm.folder / "judged.jsonl",
                {"run": configs[title, seed]["hash"]}, study, materials, console, metrics,
                worst=WORST if study.samples else 0,
            )  # fmt: skip
            scores.missing = missing
            floor = noise_floor(arm.model, materials.test, materials.catalogue.metrics["secs"]())
            pace = times_real_time(arm.model, materials.test)
        except OSError:
            raise
        except Exception as error:  # e.g. a strategy that cannot take the length of a test utterance
            console.line(f"{title}, seed {seed}: failed: {described(error)}")
            finish(arm, "failed", error=f"in judging: {described(error)}")
            continue
        arm.model.evaluation = evaluation(arm.model, scores, materials, seed=seed, steps=arm.progress.step)
        arm.model.save_pretrained(arm.folder / "model")  # again: its card now has the figures
        finish(arm, "success", pace, scores=scores, noise_floor={"secs": floor})


def check_study(
    folder: Path, study: StudySettings, arms: Sequence[ArmSettings], rates: Sequence[float], materials: Materials
) -> None:
    """Whether this study may be written into `folder`; nothing is written before it may.

    Raises:
        UserError: if the folder holds other files, other conversions, controls of another base or judge, or a run of
            another configuration.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a study's folder, or a new one, with --out")
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if present - {"study.toml"} and "study.json" not in present:
        raise UserError(f"{folder} holds files, but no study; give a new folder with --out")
    stored = folder / "pairs.json"
    if stored.is_file() and PairList.load(stored).digest != materials.test_pairs.digest:
        raise UserError(f"{folder} holds a study of other conversions (pairs.json); give a new folder with --out")
    digests = materials.digests
    for name in CONTROLS:
        found = read_result(folder / "controls" / name).get("digests", digests)
        for what in ("base", "teacher", "judge"):
            if found.get(what) != digests[what]:
                raise UserError(
                    f"{folder} holds a study with another {what} (digest {str(found.get(what))[:12]}; this one has "
                    f"{digests[what][:12]}); give a new folder with --out"
                )
    for arm in arms if not rates else ():
        for seed in study.seeds:
            check_folder(folder / arm.title / f"seed{seed}", run_config(study, arm, seed, materials))


def write_study(
    folder: Path, study: StudySettings, arms: Sequence[ArmSettings], materials: Materials, text: str
) -> None:
    """Write study.toml, study.json and pairs.json; see check_study."""
    pairs = materials.test_pairs
    pairs.export(folder / "pairs.json")
    atomic.write_text(folder / "study.toml", text)
    atomic.write_json(
        folder / "study.json",
        {
            "name": study.name,
            "title": study.name,
            "seeds": list(study.seeds),
            "arms": [arm.title for arm in arms],
            "teacher": study.teacher,
            "judge": study.judge,
            "pairs": {"digest": pairs.digest, "n": len(pairs)},
        },
    )


def _cost(arm: Arm) -> dict[str, Any]:
    progress = arm.progress
    return {
        "seconds_alone": progress.seconds_own + progress.seconds_shared,
        "seconds_own": progress.seconds_own,
        "seconds_shared": progress.seconds_shared,
        "steps": progress.step,
        "parameters": sum(parameter.numel() for _, parameter in arm.model.trained_parameters()),
        "bytes": len(save(state_of(arm.model))),
        "peak_memory_bytes": peak_memory(arm.materials.device),
    }


__all__ = [
    "CONTROLS",
    "Console",
    "Interrupted",
    "check_study",
    "run_arms",
    "run_controls",
    "shuffled_arm",
    "write_study",
]
