"""The learning rate of each arm, chosen on dev speakers with equal trials."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from runner.config import ArmSettings, StudySettings
from runner.logs import read_metrics
from runner.materials import Materials
from runner.runs import result_status
from runner.study import Console, run_arms
from snac_core import atomic
from snac_core.errors import UserError


def choose_rates(
    study: StudySettings,
    arms: Sequence[ArmSettings],
    rates: Sequence[float],
    folder: Path,
    materials: Materials,
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
    run_arms(first, list(trials.values()), places, materials, console, judge=False)
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
    atomic.write_json(working / "config.json", config)
    working.replace(folder)
