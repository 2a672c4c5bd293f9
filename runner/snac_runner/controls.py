"""What arms are compared with: controls, judged once for all arms of a study, and what they say of the judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from snac_core.codec import SNAC
from snac_core.errors import UserError, nearest
from snac_core.metric import Metric
from snac_runner.config import SHUFFLED, ArmSettings, StudySettings
from snac_runner.console import Console
from snac_runner.evaluate import systems
from snac_runner.evaluate.scoring import Scores, available, score
from snac_runner.evaluate.systems import signal_processing
from snac_runner.evaluate.verdict import MIN_RANGE
from snac_runner.resources import StudyResources
from snac_runner.run_folder import now, read_result, result_status, write_result

CONTROLS: dict[str, Callable[[SNAC], systems.System]] = {
    "source": lambda codec: systems.source(),
    "floor": systems.floor,
    "ceiling": systems.ceiling,
    "mismatched": systems.mismatched,
    "signal_processing": signal_processing,
}
NEEDS = {"signal_processing": "parselmouth"}  # control to the package that it needs


def run_controls(study: StudySettings, folder: Path, resources: StudyResources, console: Console) -> None:
    """Judge what arms are compared with, each once for all; what is there already is kept."""
    usable, missing = wanted_metrics(resources)
    content = {name: metric for name, metric in usable.items() if metric.role == "content"}
    for name, system in CONTROLS.items():
        place = folder / "controls" / name
        if result_status(place) == "success":
            continue
        if (need := NEEDS.get(name)) and find_spec(need) is None:
            console.line(f"control {name} left out: it needs {need}")
            continue
        metrics = content if name == "mismatched" else usable
        if not metrics:
            continue
        started = now()
        scores = judged(
            f"judging the control {name}", system(resources.codec), place / "judged.jsonl",
            {"control": name, **resources.digests}, study, resources, console, metrics,
        )  # fmt: skip
        scores.missing = missing
        write_result(
            place, study=study, resources=resources, status="success", arm=name, kind="control", scores=scores,
            started=started,
        )  # fmt: skip


def wanted_metrics(resources: StudyResources) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can run here and that the study wants, and for each other why not.

    Raises:
        UserError: for a metric to leave out or to add that there is not.
    """
    study = resources.study
    metrics, missing = available(resources.catalogue, study.extra_metrics)
    known = [*metrics, *missing]
    for key, names in (("exclude_metrics", study.exclude_metrics), ("extra_metrics", study.extra_metrics)):
        for name in names:
            if name not in known:
                raise UserError(f"{key} = {name!r}: no such metric{nearest(name, known)}")
    for name in study.exclude_metrics:
        metrics.pop(name, None)
        missing[name] = "left out by the study"
    return metrics, missing


def fit_metrics(folder: Path | None, resources: StudyResources) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics worth an arm's time, and for each other why not.

    A content judge that finds the bare codec's words hardly more right than another utterance's says nothing of an arm,
    and is not asked. `folder` is the one whose controls tell, None where there are none.
    """
    metrics, missing = wanted_metrics(resources)
    if folder is None:
        return metrics, missing
    bare, other = (read_result(folder / "controls" / name).get("metrics", {}) for name in ("floor", "mismatched"))
    for name in [name for name, metric in metrics.items() if metric.role == "content"]:
        ends = [control.get(name, {}).get("mean") for control in (bare, other)]
        if None in ends:
            continue
        span = ends[1] - ends[0]
        if span < MIN_RANGE:
            del metrics[name]
            missing[name] = (
                f"on this base it tells right words from wrong ones by {100 * span:.0f} points, {100 * MIN_RANGE:.0f} "
                "are needed"
            )
    return metrics, missing


def shuffled_arm(study: StudySettings, arms: Sequence[ArmSettings]) -> list[ArmSettings]:
    """The first arm once more, under wrong embeddings; nothing where the study does without."""
    first = arms[0].model_copy(update={"name": SHUFFLED, "shuffled_speakers": True})
    return [first] if study.shuffled_control else []


def judged(
    title: str,
    system: systems.System,
    journal: Path,
    key: dict[str, Any],
    study: StudySettings,
    resources: StudyResources,
    console: Console,
    metrics: dict[str, Metric],
    worst: int = 0,
) -> Scores:
    """Judge a system on the test conversions, going on from its journal; see `snac_runner.evaluate.scoring.score`."""
    return score(
        system, resources.test, resources.catalogue, only=metrics, keep=study.samples, worst=worst,
        journal=journal, key=key, probe=resources.probe, progress=console.progress(title),
    )  # fmt: skip
