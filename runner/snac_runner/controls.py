"""What arms are compared with: controls, evaluated once for all arms; and which metrics are worth measuring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from snac_core.codec import SNAC
from snac_core.errors import UserError, nearest
from snac_core.metric import Metric
from snac_runner.config import RENAMED_METRICS, ArmSettings
from snac_runner.data.audio import resample
from snac_runner.distributed import check_machine
from snac_runner.evaluate import systems
from snac_runner.evaluate.content import WordErrors, transcripts, wrong_texts
from snac_runner.evaluate.metrics import by_further_judges
from snac_runner.evaluate.scoring import (
    BLOCK,
    Journal,
    Scores,
    available,
    journal_key,
    rows_of,
    score,
    worst_conversions,
)
from snac_runner.evaluate.verdict import MIN_RANGE
from snac_runner.evaluate.whisper import BATCH, SAMPLE_RATE
from snac_runner.resources import StudyResources
from snac_runner.run_folder import read_result, result_status
from snac_runner.run_result import Result, compared_values, write_result

CONTROLS: dict[str, Callable[[SNAC, Collection[str]], systems.System]] = {
    "source": lambda codec, outputs: systems.source(outputs),
    "floor": systems.floor,
    "ceiling": lambda codec, outputs: systems.ceiling(codec),
    "mismatched": lambda codec, outputs: systems.mismatched(codec),
    "signal_processing": lambda codec, outputs: systems.signal_processing(codec),
}
"""Name to what makes the system from the codec and the outputs that a metric judges."""
MIN_NATURAL = 2.5
"""Mean opinion score that a predictor of naturalness must give the unchanged sources."""
NEEDS = {"signal_processing": "parselmouth"}  # control to the package that it needs


class MetricSelection(NamedTuple):
    """Metrics to measure, and for each other metric the reason why it is not measured."""

    metrics: dict[str, Metric]
    missing: dict[str, str]


def run_controls(folder: Path, resources: StudyResources) -> None:
    """Evaluate the controls into `folder`/controls; finished ones are kept."""
    metrics, missing = wanted_metrics(resources)
    context = resources.context
    context.first_decides(lambda: check_versions(folder, metrics, resources))
    done = context.agree([name for name in CONTROLS if result_status(folder / "controls" / name) == "success"])
    if len(done) < len(CONTROLS) and context.first:
        check_speech(resources, metrics)
    content = {name: metric for name, metric in metrics.items() if metric.role == "content"}
    for name in CONTROLS:
        place = folder / "controls" / name
        if name in done:
            continue
        if (need := NEEDS.get(name)) and find_spec(need) is None:
            resources.console.line(f"control {name} is left out: it needs {need}")
            continue
        selected = content if name == "mismatched" else metrics
        if not selected:
            continue
        result = Result(place, name, "control")
        result.scores = evaluate_system(
            result, partial(_control, name, systems.needed_outputs(selected.values())),
            {"control": name, **resources.digests}, resources, MetricSelection(selected, missing),
        )  # fmt: skip
        write_result(result, resources)


def _control(name: str, outputs: Collection[str], resources: StudyResources) -> systems.System:
    return CONTROLS[name](resources.codec, outputs)


def check_versions(folder: Path, metrics: Mapping[str, Metric], resources: StudyResources) -> None:
    """Refuse to add to a study with controls that another recogniser has judged: its figures are not comparable.

    Raises:
        UserError: naming the metric, what judged it there, and what would judge it now.
    """
    for name in CONTROLS:
        for metric, measured in read_result(folder / "controls" / name).get("metrics", {}).items():
            there = measured.get("version") or ""
            now = metrics[metric].version if metric in metrics else ""
            if measured.get("role") == "content" and there != now and metric not in resources.study.exclude_metrics:
                raise UserError(
                    f"{folder} holds controls with {metric} by {there!r}, and here it "
                    f"{f'is by {now!r}' if now else 'is not measured'}; use the same recogniser "
                    "(--whisper, --language), or a new folder with --out"
                )


def check_metric_names(resources: StudyResources) -> None:
    """Raise UserError for an unknown metric in the study's `exclude_metrics` or `extra_metrics`."""
    known = list(resources.catalogue.metrics)
    for key in ("exclude_metrics", "extra_metrics"):
        for name in getattr(resources.study, key):
            if name in RENAMED_METRICS:
                raise UserError(f"{key}: {name!r} is now {RENAMED_METRICS[name]!r}")
            if name not in known:
                raise UserError(f"{key} = {name!r}: unknown metric{nearest(name, known)}")


OTHER_LANGUAGE = 0.8  # mean probability from which on the speech is said to be in another language
SHOWN = 3  # utterances that a warning names


def check_speech(resources: StudyResources, metrics: Mapping[str, Metric]) -> None:
    """Warn of texts that are not what the sources say, and of speech in another language, by Whisper."""
    judges = [metric for metric in metrics.values() if isinstance(metric, WordErrors)]
    if not judges or (recogniser := judges[0].recogniser) is None:
        return
    console, rate = resources.console, resources.test.sample_rate
    items = {item.pair.source.utterance: item for item in resources.test.items}
    waves = [item.audio[0] for item in items.values()]
    readings = dict(zip(items, transcripts(recogniser, waves, rate), strict=True))
    texts = {name: text for name, item in items.items() if (text := item.pair.text)}
    others = [(u.id, u.text) for u in resources.corpus.split("test") if u.text]
    wrong = wrong_texts(texts, readings, others, recogniser.words)
    if wrong:
        named = [
            f"{name} (says {readings[name]!r}{f', the text of {other}' if other else f', not {texts[name]!r}'})"
            for name, other in list(wrong.items())[:SHOWN]
        ]
        console.warning(
            f"the texts of {len(wrong)} of {len(texts)} sources differ from what is said: {'; '.join(named)}"
            f"{'; and others' if len(wrong) > SHOWN else ''}; correct them, or remove them to judge by the transcript"
        )
    spoken = recogniser.languages([resample(wave, rate, SAMPLE_RATE) for wave in waves[:BATCH]])
    language, probability = max(spoken.items(), key=lambda entry: entry[1])
    if language != recogniser.language and probability >= OTHER_LANGUAGE:
        console.warning(
            f"the speech is probably in {language!r} (probability {probability:.2f}), and is read as "
            f"{recogniser.language!r}: give --language {language}"
        )


def wanted_metrics(resources: StudyResources) -> MetricSelection:
    """The metrics that can run here and that the study asks for.

    Raises:
        UserError: for an unknown metric in `exclude_metrics` or `extra_metrics`.
    """
    check_metric_names(resources)
    study = resources.study
    metrics, missing = available(
        resources.catalogue, study.extra_metrics, excluded=study.exclude_metrics, language=study.language,
        recogniser=lambda: resources.whisper,
    )  # fmt: skip
    metrics |= by_further_judges(metrics, resources.judges)
    return MetricSelection(metrics, missing)


def informative_metrics(folder: Path | None, resources: StudyResources) -> MetricSelection:
    """The metrics that the study asks for, without those that the controls show to say nothing about an arm here.

    Those are content judges that find about as many errors in the bare codec's output as in the words of another
    utterance, and predictors of naturalness that give the unchanged sources a low score, as for synthetic voices.

    Args:
        folder: the folder with the evaluated controls; None: there are none, and every metric is kept.
        resources: of the study.
    """
    metrics, missing = wanted_metrics(resources)
    if folder is None:
        return MetricSelection(metrics, missing)
    resources.context.wait()  # until the first process has written the controls
    source, bare, other = (
        read_result(folder / "controls" / name).get("metrics", {}) for name in ("source", "floor", "mismatched")
    )
    for name in [name for name, metric in metrics.items() if metric.role == "naturalness"]:
        natural = source.get(name, {}).get("mean")
        if natural is not None and natural < MIN_NATURAL:
            del metrics[name]
            missing[name] = f"on this speech it gives the unchanged sources {natural:.2f}; {MIN_NATURAL} is needed"
    for name in [name for name, metric in metrics.items() if metric.role == "content"]:
        low, high = (control.get(name, {}).get("mean") for control in (bare, other))
        if low is None or high is None:
            continue
        if high - low < MIN_RANGE:
            del metrics[name]
            missing[name] = (
                f"on this base its errors differ by {100 * (high - low):.0f} points between right and wrong words; "
                f"{100 * MIN_RANGE:.0f} are needed"
            )
    return MetricSelection(metrics, missing)


MakeSystem = Callable[[StudyResources], systems.System]
"""Makes a system. Other machines make it again, if they evaluate it: then it can be sent to them."""


def evaluate_system(
    result: Result,
    make: MakeSystem,
    key: dict[str, Any],
    resources: StudyResources,
    selection: MetricSelection,
    worst: int = 0,
) -> Scores:
    """Score a system on the test conversions, resuming from the result's journal.

    Args:
        result: names the system, and has the journal; its scores are not set.
        make: gives what converts.
        key: everything that identifies the system; a journal with another key is discarded.
        resources: of the study. If they have `spread`, other machines score the conversions that the journal lacks.
        selection: the metrics to measure.
        worst: of how many of the conversions least like their target the audio is kept.
    """
    title = f"evaluating {'the control ' if result.kind == 'control' else ''}{result.arm}"
    if result.seed is not None:
        title += f", seed {result.seed}"
    context, metrics = resources.context, selection.metrics
    journal = Journal(result.journal, journal_key(key, resources.test, metrics)) if context.first else None
    progress = resources.console.progress(title)
    if resources.spread and journal:
        lacking = [item.pair.id for item in resources.test.items if item.pair.id not in journal.rows]
        arms = [result.settings] if result.settings else []
        work = partial(_rows, make, arms, tuple(metrics), _compared(arms, metrics, resources))
        blocks = [lacking[first : first + BLOCK] for first in range(0, len(lacking), BLOCK)]
        for rows in resources.spread(work, {f"{title}, conversions from {block[0]} on": block for block in blocks}):
            for row in rows:
                journal.add(row)
    system = make(resources)
    scores = score(
        system, resources.test, metrics, keep=resources.study.samples if context.first else 0,
        journal=journal, probe=resources.probe if context.first else None, context=context, progress=progress,
    )  # fmt: skip
    scores.worst = worst_conversions(scores, system, resources.test, worst if context.first else 0)
    scores.missing = selection.missing
    return scores


def _rows(
    make: MakeSystem,
    arms: Sequence[ArmSettings],
    names: Sequence[str],
    of_command: Mapping[str, str],
    resources: StudyResources,
    pairs: Sequence[str],
) -> list[dict[str, Any]]:
    """The journal's rows of these pairs, by the metrics of these names; on a machine of a cluster."""
    wanted = _wanted_once(resources)
    metrics = {name: wanted[name] for name in names if name in wanted}
    check_machine(_compared(arms, metrics, resources), of_command)
    items = {item.pair.id: item for item in resources.test.items}
    progress = resources.console.progress(f"{len(pairs)} conversions from {pairs[0]} on")
    return rows_of(make(resources), [items[id] for id in pairs], resources.test, metrics, progress)


@lru_cache(maxsize=1)
def _wanted_once(resources: StudyResources) -> dict[str, Metric]:
    return wanted_metrics(resources).metrics


def _compared(arms: Sequence[ArmSettings], metrics: Mapping[str, Metric], resources: StudyResources) -> dict[str, str]:
    """What is equal on all machines that score the same conversions, in words, to its value."""
    return {
        **compared_values(arms, resources),
        "digest of the conversions": resources.test_pairs.digest,
        **{f"metric {name}": metric.version or "without a version" for name, metric in metrics.items()},
    }
