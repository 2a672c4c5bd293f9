"""Stopping between two steps, not within one.

The training loop: the arms of one seed side by side, on the same batches and the same frozen computations."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from snac_core.checkpoint import load_state, state_of
from snac_core.plugin_guard import describe_error
from snac_core.speakers.sampling import SpeakerSampler
from snac_runner.arm import Arm, TrainingFailure
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.systems import conditioned
from snac_runner.logs import RunLog
from snac_runner.resources import StudyResources


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that the step in progress ends; the second stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(_number: int, _frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)


DEV_METRICS = ("secs", "spk_id", "spk_vc", "gap", "specificity", "speaker_encoder_secs")


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, between two steps, and every arm has saved its checkpoint."""


def train_side_by_side(
    arms: Sequence[Arm], resources: StudyResources, *, tell: Callable[[int, int, dict[str, dict[str, float]]], None]
) -> dict[str, str]:
    """Train arms of one seed to their end, going on from their checkpoints.

    An arm's result does not depend on which others are here: batches and targets come from (seed, step), each arm's
    own random numbers too, and what is shared is frozen.

    Args:
        arms: of one seed; an arm whose checkpoint is ahead of the others waits for them.
        resources: what they share.
        tell: called after each step with (step, steps, arm title -> what it logged).

    Returns:
        arm title to the reason, for each arm that failed; the others are finished.

    Raises:
        Interrupted: on Ctrl-C, after all checkpoints were written.
    """
    study, seed = resources.study, arms[0].seed
    batches, sampler = resources.batches(seed), SpeakerSampler(resources.table, seed)
    logs = {arm.settings.title: RunLog(arm.folder, batches.steps_per_epoch, arm.progress.step) for arm in arms}
    failures: dict[str, str] = {}
    active = [arm for arm in arms if not arm.progress.finished]
    try:
        with stoppable() as interrupted:
            for index in range(min((arm.progress.step for arm in active), default=study.steps) + 1, study.steps + 1):
                now = [arm for arm in active if arm.progress.step < index]
                started = time.perf_counter()
                bare, speakers, targets = resources.drawn(index, batches, sampler)
                drawing = time.perf_counter() - started
                logged: dict[str, dict[str, float]] = {}
                for arm in now:
                    title, log = arm.settings.title, logs[arm.settings.title]
                    judged = None
                    try:
                        started, shared = arm.clock(), bare.seconds
                        logged[title] = arm.step(index, bare, speakers, targets)
                        arm.progress.seconds_own += arm.clock() - started - (bare.seconds - shared)
                        if (study.eval_every and index % study.eval_every == 0) or index == study.steps:
                            judged = _judge_on_dev(arm, resources)
                    except Exception as error:  # one arm's failure is its own; KeyboardInterrupt passes
                        failures[title] = str(error) if isinstance(error, TrainingFailure) else describe_error(error)
                        active.remove(arm)
                    if title in logged:  # outside: a full disk is no failure of the arm
                        log.write({"step": index, "seconds": arm.progress.seconds_own, **logged[title]})
                    if judged is not None:
                        log.write({"step": index, "dev": judged})
                stopping = interrupted.is_set()  # read once: whoever stops has saved
                for arm in now:
                    arm.progress.seconds_shared += drawing + bare.seconds
                    if arm in active and (index % study.save_every == 0 or arm.progress.finished or stopping):
                        logs[arm.settings.title].flush()
                        arm.save()
                tell(index, study.steps, logged)
                active = [arm for arm in active if not arm.progress.finished]
                if stopping:
                    raise Interrupted(f"stopped after step {index} of {study.steps}")
                if not active:
                    break
    finally:
        for log in logs.values():
            log.close()
    for arm in arms:
        if study.select == "best" and arm.best_state:
            load_state(arm.model.attached, arm.best_state, "the best checkpoint")
    return failures


def dev_score(pooled: dict[str, dict[str, float]]) -> float:
    """What checkpoints and settings are chosen by on dev, lower is better: spk_vc + spk_id by the judge.

    Conversion alone would prefer a model that forgets what the source said; both ends of the gap count.
    """
    return pooled["spk_vc"]["mean"] + pooled["spk_id"]["mean"]


def _judge_on_dev(arm: Arm, resources: StudyResources) -> dict[str, float]:
    """Judge conversions of dev speakers, keep the best state, and stop where patience runs out; what to log of it."""
    study, progress = resources.study, arm.progress
    metrics = {name: resources.catalogue.metrics[name]() for name in DEV_METRICS}
    pooled = score(conditioned(arm.model, synthetic=False), resources.dev, resources.catalogue, only=metrics).pooled
    found = dev_score(pooled)
    judge = resources.judge.name
    measured = {
        f"judge/{judge}/{name}": values["mean"] for name, values in pooled.items() if name != "speaker_encoder_secs"
    }
    measured[f"speaker_encoder/{resources.speaker_encoder.name}/secs"] = pooled["speaker_encoder_secs"]["mean"]
    if found < progress.best:
        progress.best, progress.best_step, progress.stale = found, progress.step, 0
        if study.select == "best":
            arm.best_state = {key: value.clone() for key, value in state_of(arm.model.attached).items()}
    else:
        progress.stale += 1
    if progress.step == study.steps or (study.patience and progress.stale >= study.patience):
        progress.finished = True
    return {**measured, "score": found}
