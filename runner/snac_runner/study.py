"""Before an arm trains: whether it can learn at all, on the real codec and a real batch, without a trace.

A study: arms x seeds into run folders, the controls beside them, the report at the end.

The learning rate of each arm, chosen on dev speakers with equal trials."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from snac_core.checkpoint import state_of
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.files import write_json, write_text
from snac_core.frozen import FrozenActivations
from snac_core.plugin_guard import describe_error
from snac_core.testing import preflight as check_rules
from snac_runner.arm import Arm, terms_of
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.console import Console
from snac_runner.controls import CONTROLS, fit_metrics, judged, run_controls
from snac_runner.data.pairs import PairList
from snac_runner.evaluate.model_figures import evaluation, noise_floor, times_real_time
from snac_runner.evaluate.systems import conditioned
from snac_runner.logs import read_metrics
from snac_runner.resources import StudyResources
from snac_runner.run_folder import check_folder, now, peak_memory, read_result, result_status, run_config, write_result
from snac_runner.train import train_side_by_side

ROWS = 3


def preflight(arm: Arm) -> None:
    """Refuse an arm with a strategy that gets no gradient, ignores its embedding, mixes the batch, or changes shapes.

    Raises:
        UserError: naming the strategy and what to change; or a weight for a term that nothing computes.
    """
    resources = arm.resources
    batch = resources.batches(arm.seed).at(0)
    rows = min(ROWS, len(batch.speakers))
    audio = batch.audio[:rows].to(resources.device)
    speakers = resources.table.rows(batch.speakers[:rows])
    targets = arm.sampler.targets(speakers, 0, 1)
    cond = Conditioning(resources.table.conditioning[targets].to(resources.device), encoder=resources.table.encoder)

    def loss(model: ConditionedCodec) -> Tensor:
        step = arm.make_step(0, FrozenActivations(resources.codec, audio), speakers, targets, model)
        terms = terms_of(step, "loss")
        arm.check_weights({*terms, *terms_of(step, "discriminator_loss")})
        return arm.weighted(terms)

    check_rules(arm.model, loss, audio, cond, seed=arm.seed)


WORST = 10  # conversions least like their target whose audio is kept for the report


def run_arms(
    study: StudySettings,
    arms: Sequence[ArmSettings],
    folders: dict[tuple[str, int], Path],
    resources: StudyResources,
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
        resources: what they share.
        console: where to say how far it is.
        controls: the folder to judge the controls into, before the first arm is judged; None: no controls.
        judge: False: train, and hear nothing of the test split.

    Raises:
        UserError: if a folder holds a run of another configuration (nothing is trained then), or an arm cannot learn.
        Interrupted: on Ctrl-C; what was done so far is kept and goes on from there.
    """
    by_title = {arm.title: arm for arm in arms}
    configs = {key: run_config(study, by_title[key[0]], key[1], resources) for key in folders}
    states = {key: check_folder(folder, configs[key]) for key, folder in folders.items()}
    for (title, seed), state in states.items():
        if state in ("success", "failed"):
            console.line(f"{title}, seed {seed}: finished already ({state}), left as it is")
    for seed in study.seeds:
        todo = [arm for arm in arms if states.get((arm.title, seed)) in ("new", "unfinished")]
        if todo:
            _run_seed(study, todo, seed, folders, configs, resources, console, controls, judge)


def _run_seed(
    study: StudySettings,
    todo: Sequence[ArmSettings],
    seed: int,
    folders: dict[tuple[str, int], Path],
    configs: dict[tuple[str, int], dict[str, Any]],
    resources: StudyResources,
    console: Console,
    controls: Path | None,
    judge: bool,
) -> None:
    started = now()
    training = []
    for settings in todo:
        try:
            arm = Arm.new(settings, seed, folders[settings.title, seed], resources)
            if not arm.load():
                preflight(arm)
        except (UserError, OSError):
            raise
        except Exception as error:  # a plugin's own code
            raise UserError(f"arm {settings.title!r} cannot start: {describe_error(error)}") from error
        training.append(arm)
    for arm in training:
        write_json(arm.folder / "config.json", configs[arm.settings.title, seed])

    progress = console.progress(f"seed {seed}: training {len(training)} arm(s) side by side")

    def tell(step: int, steps: int, logged: dict[str, dict[str, float]]) -> None:
        shown = "  ".join(
            f"{title}: gap {values['gap']:.3f}" if "gap" in values else f"{title}: loss {values['loss']:.3f}"
            for title, values in logged.items()
        )
        progress(step, steps, shown)

    def finish(arm: Arm, status: str, pace: float | None = None, **extra: Any) -> None:
        title = arm.settings.title
        write_result(
            arm.folder, study=study, resources=resources, status=status, arm=title, seed=seed,
            kind="control" if arm.settings.shuffled_speakers else "arm", settings=arm.settings, config=configs[title, seed],
            cost=_cost(arm) | {"times_real_time": pace}, started=started, **extra,
        )  # fmt: skip

    try:
        failures = train_side_by_side(training, resources, tell=tell)
    except KeyboardInterrupt:
        for arm in training:
            finish(arm, "cancelled", error=f"interrupted at step {arm.progress.step} of {study.steps}")
        raise
    if judge and controls is not None and len(failures) < len(training):
        run_controls(study, controls, resources, console)
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
            metrics, missing = fit_metrics(controls, resources)
            scores = judged(
                f"judging {title}, seed {seed}", conditioned(arm.model), arm.folder / "judged.jsonl",
                {"run": configs[title, seed]["hash"]}, study, resources, console, metrics,
                worst=WORST if study.samples else 0,
            )  # fmt: skip
            scores.missing = missing
            floor = noise_floor(arm.model, resources.test, resources.catalogue.metrics["secs"]())
            pace = times_real_time(arm.model, resources.test)
        except OSError:
            raise
        except Exception as error:  # e.g. a strategy that cannot take the length of a test utterance
            console.line(f"{title}, seed {seed}: failed: {describe_error(error)}")
            finish(arm, "failed", error=f"in judging: {describe_error(error)}")
            continue
        arm.model.evaluation = evaluation(arm.model, scores, resources, seed=seed, steps=arm.progress.step)
        arm.model.save_pretrained(arm.folder / "model")  # again: its card now has the figures
        finish(arm, "success", pace, scores=scores, noise_floor={"secs": floor})


def check_study(
    folder: Path, study: StudySettings, arms: Sequence[ArmSettings], rates: Sequence[float], resources: StudyResources
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
    if stored.is_file() and PairList.load(stored).digest != resources.test_pairs.digest:
        raise UserError(f"{folder} holds a study of other conversions (pairs.json); give a new folder with --out")
    digests = resources.digests
    for name in CONTROLS:
        found = read_result(folder / "controls" / name).get("digests", digests)
        for what in ("base", "speaker_encoder", "judge"):
            if found.get(what) != digests[what]:
                raise UserError(
                    f"{folder} holds a study with another {what} (digest {str(found.get(what))[:12]}; this one has "
                    f"{digests[what][:12]}); give a new folder with --out"
                )
    for arm in arms if not rates else ():
        for seed in study.seeds:
            check_folder(folder / arm.title / f"seed{seed}", run_config(study, arm, seed, resources))


def write_study(
    folder: Path, study: StudySettings, arms: Sequence[ArmSettings], resources: StudyResources, text: str
) -> None:
    """Write study.toml, study.json and pairs.json; see check_study."""
    pairs = resources.test_pairs
    pairs.export(folder / "pairs.json")
    write_text(folder / "study.toml", text)
    write_json(
        folder / "study.json",
        {
            "name": study.name,
            "title": study.name,
            "seeds": list(study.seeds),
            "arms": [arm.title for arm in arms],
            "speaker_encoder": study.speaker_encoder,
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
        "bytes": len(save(state_of(arm.model.attached))),
        "peak_memory_bytes": peak_memory(arm.resources.device),
    }


def choose_rates(
    study: StudySettings,
    arms: Sequence[ArmSettings],
    rates: Sequence[float],
    folder: Path,
    resources: StudyResources,
    console: Console,
) -> list[ArmSettings]:
    """Give each arm the learning rate with the best dev score, found with equal trials on the first seed.

    The trials are trained like any run, under trials/, and never judged on test: only the chosen one is, as the arm's
    run of that seed.
    """
    trials = {
        (arm.title, rate): arm.model_copy(update={"name": f"{arm.title} lr={rate:g}", "lr": rate})
        for arm in arms
        for rate in rates
    }
    first = study.model_copy(update={"seeds": study.seeds[:1]})
    seed = first.seeds[0]
    places = {(trial.title, seed): folder / "trials" / trial.title / f"seed{seed}" for trial in trials.values()}
    run_arms(first, list(trials.values()), places, resources, console, judge=False)
    chosen = []
    for arm in arms:
        scores = {}
        for rate in rates:
            place = places[trials[arm.title, rate].title, seed]
            judged = [record["dev"]["score"] for record in read_metrics(place / "metrics.jsonl") if "dev" in record]
            if result_status(place) == "success" and judged:
                scores[rate] = min(judged) if study.select == "best" else judged[-1]
        if not scores:
            raise UserError(
                f"arm {arm.title!r} failed with every learning rate of {list(rates)}; see {folder / 'trials'}"
            )
        best = min(scores, key=scores.__getitem__)
        listed = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in scores.items())
        console.line(f"{arm.title}: lr {best:g} by dev score ({listed})")
        chosen.append(arm.model_copy(update={"lr": best}))
        _adopt(places[trials[arm.title, best].title, seed], folder / arm.title / f"seed{seed}", chosen[-1])
    return chosen


def _adopt(trial: Path, folder: Path, arm: ArmSettings) -> None:
    """Copy a trained trial to be the arm's run of its seed: the very run that would be made again, not judged yet."""
    if folder.exists():
        return
    working = folder.with_name(f".{folder.name}.adopted")
    shutil.rmtree(working, ignore_errors=True)
    shutil.copytree(trial, working, ignore=shutil.ignore_patterns("result.json"))
    config = json.loads((working / "config.json").read_text())
    config["arm"]["name"] = arm.name
    write_json(working / "config.json", config)
    working.replace(folder)
