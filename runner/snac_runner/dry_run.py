"""`--dry-run`: what a study will do, what it will cost, and which effects it can detect."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from snac_core.metric import Metric
from snac_runner.arm import Arm
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.controls import CONTROLS, wanted_metrics
from snac_runner.data.latents import CacheEstimate, LatentCache
from snac_runner.evaluate.scoring import score_conversions
from snac_runner.evaluate.systems import conditioned, needed_outputs
from snac_runner.evaluate.verdict import (
    StandardDeviations,
    StudySize,
    noninferiority_power,
    planned_detectable_effect,
    shortfalls,
)
from snac_runner.memory import PeakMemory, gibibytes
from snac_runner.resources import StudyResources
from snac_runner.train import DEV_METRICS, preflight
from snac_runner.train_step import train_step

TRIED_STEPS = 3
PART = 2, 0.5  # items, and s of each, of the batch that is tried first on a CPU
WHOLE = 30.0, 2 * 2**30  # s and bytes of a step up to which the whole batch is tried afterwards
# Assumed standard deviations of a difference in normalised SECS between two arms, per factor. Only the estimates of a
# dry run use them; the report computes the minimum detectable effect from its own data.
SPREAD = StandardDeviations(seed=0.05, target=0.15, source=0.10, residual=0.20)
CONTENT_SPREAD = StandardDeviations(
    seed=0.02, target=0.04, source=0.07, residual=0.10
)  # the same for a difference in error rates


def describe_plan(arms: Sequence[ArmSettings], rates: Sequence[float], resources: StudyResources) -> str:
    """The arms as diffs from the defaults, time, memory, and the minimum detectable effect of this size."""
    study = resources.study
    resources.utterances = None  # a plan does not embed the speech; draws take milliseconds either way
    resources.check(choose_rates=bool(rates))
    lines = [f"study {study.name!r}: {len(arms)} arm(s) x {len(study.seeds)} seed(s), {study.steps} steps each"]
    first = ArmSettings().model_dump()
    for arm in arms:
        own = arm.model_dump()
        diff = {k: v for k, v in own.items() if v != first[k] and k not in ("name", "strategies")}
        lines.append(f"  {arm.title}: " + (", ".join(f"{k} = {v}" for k, v in diff.items()) or "default settings"))
    lacking, building = _estimate_caches(resources)
    train, memory, tried = _training(arms, resources)
    metrics, _ = wanted_metrics(resources)
    evaluation = _evaluation(arms[0], resources, metrics)
    shuffled = int(study.shuffled_control)  # an arm more for the first seed
    trials = max(0, len(rates) - 1)  # of each arm; the best one is the run of the first seed
    trained = len(arms) * (len(study.seeds) + trials) + shuffled
    evaluated = len(arms) * len(study.seeds) + shuffled + len(CONTROLS) + len(study.adapters)
    seconds = train / len(arms) * study.steps * trained + evaluation * len(resources.test_pairs) * evaluated
    if len(resources.dev_pairs):
        on_dev = _evaluation(arms[0], resources, {name: resources.catalogue.metrics[name]() for name in DEV_METRICS})
        times = math.ceil(study.steps / study.eval_every) if study.eval_every else 1
        seconds += on_dev * len(resources.dev_pairs) * times * trained
    if rates:
        lines.append(f"  each arm tries lr {', '.join(f'{rate:g}' for rate in rates)} on seed {study.seeds[0]} first")
    if lacking:
        lines.append(
            f"latent cache: {lacking / 1e6:.0f} MB are not on disk; computing them takes about {_duration(building)} "
            "here, once"
        )
        seconds += building
    lines.append(
        f"time: about {_duration(seconds)} here ({train:.2f} s a step side by side, {evaluation:.2f} s to evaluate a "
        "conversion)"
    )
    lines.append("memory: " + ", ".join(f"{gibibytes(peak)} in a step of {title}" for title, peak in memory.items()))
    if tried is not None:
        part, whole = (f"{one.batch_size} x {one.crop_seconds:g} s" for one in (tried, resources.study))
        lines.append(f"  (time and memory of a step are estimated for {whole} from steps of {part})")
    pairs = resources.test_pairs
    targets = len({pair.target for pair in pairs.pairs})
    sources = len({pair.source.utterance for pair in pairs.pairs})
    content = [metric for metric in metrics.values() if metric.role == "content"]
    comparisons = (1 + bool(content)) * max(1, len(arms) * (len(arms) - 1) // 2)
    size = StudySize(len(study.seeds), targets, sources, len(pairs), max(2, len(arms)))
    effect = planned_detectable_effect(size, SPREAD, comparisons=comparisons)
    lines.append(
        f"test: {len(pairs)} conversions of {sources} sources to {targets} target speakers; minimum detectable effect "
        f"in normalised SECS, at a power of 80 %: about {effect:.2f} (with an assumed spread between conversions)"
    )
    if content:
        margin = min(metric.margin for metric in content)
        kept = noninferiority_power(size, CONTENT_SPREAD, margin)
        lines.append(
            f"content: to be called better, an arm must also be shown to add less than {100 * margin:.0f} points of "
            f"content errors; for an arm that adds none, about {100 * kept:.0f} % of such studies can show it"
        )
    missing = shortfalls(targets=targets, seeds=len(study.seeds), ok=1.0, comparisons=comparisons)
    lines += [f"no verdict will be given: {reason}" for reason in missing]
    return "\n".join(lines)


def _estimate_caches(resources: StudyResources) -> tuple[int, float]:
    """Bytes that the latent caches lack on disk, and the time in s to compute them.

    From here on, `resources` have estimates in place of caches that lack something: a plan does not build them.
    """
    lacking, seconds = 0, 0.0

    def estimated(cache: LatentCache, what: str) -> CacheEstimate:
        nonlocal lacking, seconds
        estimate = CacheEstimate(cache, resources.console.progress(f"{what}, of a few utterances"))
        lacking, seconds = lacking + cache.missing_bytes, seconds + estimate.seconds
        return estimate

    latents, voices = resources.latent_cache(), resources.imitation_caches()
    resources.latents = estimated(latents, "latents") if latents and latents.missing_bytes else latents
    resources.imitations = [
        estimated(voice, f"imitated voice {number}") if voice.missing_bytes else voice
        for number, voice in enumerate(voices, 1)
    ]
    return lacking, seconds


def _training(
    arms: Sequence[ArmSettings], resources: StudyResources
) -> tuple[float, dict[str, int], StudySettings | None]:
    """Seconds of a step of all arms, and peak memory by arm, in bytes. Every arm passes the preflight checks.

    On a CPU, both are first measured with a part of the batch, as a large batch can take minutes and fill the memory.
    They are proportional to the seconds of speech in a batch, apart from the memory that is in use before.

    Returns:
        also the settings with the part that was measured, if the whole batch was not.
    """
    study = resources.study
    items, seconds = min(PART[0], study.batch_size), min(PART[1], study.crop_seconds)
    if study.latent_cache or study.imitations:  # their latents may depend on the length of a crop
        seconds = study.crop_seconds
    if resources.device.type != "cpu" or (items, seconds) == (study.batch_size, study.crop_seconds):
        return *_measured(arms, resources, check=True), None
    part = resources.with_batch(items, seconds)
    with PeakMemory(resources.device) as before:
        pass
    taken, peaks = _measured(arms, part, check=True)
    share = study.batch_size * study.crop_seconds / (items * seconds)
    expected = {
        title: before.peak + round((peak - before.peak) * share / study.accumulate) for title, peak in peaks.items()
    }
    if taken * share <= WHOLE[0] and max(expected.values()) <= WHOLE[1]:
        return *_measured(arms, resources, check=False), None
    return taken * share, expected, part.study


def _measured(arms: Sequence[ArmSettings], resources: StudyResources, *, check: bool) -> tuple[float, dict[str, int]]:
    """Seconds of a step of new arms, side by side, and the peak memory of each; `check` runs the preflight checks."""
    with TemporaryDirectory() as folder:
        seed = resources.study.seeds[0]
        trained = [Arm.new(arm, seed, Path(folder) / str(i), resources) for i, arm in enumerate(arms)]
        for arm in trained if check else ():
            preflight(arm)
        batches = resources.batches(seed)
        for index in range(1, TRIED_STEPS + 1):
            if index == 2:  # the first step warms caches
                started = time.perf_counter()
            parts = (resources.draw(index, batches, trained[0].sampler, rows) for rows in resources.parts)
            train_step(trained, parts, resources.context).checked()
        seconds = (time.perf_counter() - started) / (TRIED_STEPS - 1)
        return seconds, {arm.settings.title: arm.progress.peak_memory for arm in trained}


def _evaluation(settings: ArmSettings, resources: StudyResources, metrics: Mapping[str, Metric]) -> float:
    """Seconds of evaluating one conversion."""
    with TemporaryDirectory() as folder:
        arm = Arm.new(settings, resources.study.seeds[0], Path(folder), resources)
        for item in resources.test.items[:2]:  # the first one loads the tools; its transcript is then cached
            started = time.perf_counter()
            rendering = conditioned(arm.model, outputs=needed_outputs(metrics.values()))(resources.test, item)
            list(score_conversions([item], [rendering], resources.test, metrics))
        return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
