"""The training loop: the arms of one seed side by side, on the same batches and the same frozen computations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from runner.arm import Arm
from runner.evaluate.judging import score
from runner.evaluate.systems import conditioned
from runner.logs import RunLog
from runner.materials import Materials
from runner.stopping import stoppable
from runner.terms import TrainingFailure
from snac_core.checkpoint import load_state, state_of
from snac_core.containment import described
from snac_core.speakers.sampling import SpeakerSampler

DEV_METRICS = ("secs", "spk_id", "spk_vc", "gap", "specificity", "teacher_secs")


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, between two steps, and every arm has saved its checkpoint."""


def train_side_by_side(
    arms: Sequence[Arm], materials: Materials, *, tell: Callable[[int, int, dict[str, dict[str, float]]], None]
) -> dict[str, str]:
    """Train arms of one seed to their end, going on from their checkpoints.

    An arm's result does not depend on which others are here: batches and targets come from (seed, step), each arm's
    own random numbers too, and what is shared is frozen.

    Args:
        arms: of one seed; an arm whose checkpoint is ahead of the others waits for them.
        materials: what they share.
        tell: called after each step with (step, steps, arm title -> what it logged).

    Returns:
        arm title to the reason, for each arm that failed; the others are finished.

    Raises:
        Interrupted: on Ctrl-C, after all checkpoints were written.
    """
    study, seed = materials.study, arms[0].seed
    batches, sampler = materials.batches(seed), SpeakerSampler(materials.table, seed)
    logs = {arm.settings.title: RunLog(arm.folder, batches.steps_per_epoch, arm.progress.step) for arm in arms}
    failures: dict[str, str] = {}
    active = [arm for arm in arms if not arm.progress.finished]
    try:
        with stoppable() as interrupted:
            for index in range(min((arm.progress.step for arm in active), default=study.steps) + 1, study.steps + 1):
                now = [arm for arm in active if arm.progress.step < index]
                started = time.perf_counter()
                bare, speakers, targets = materials.drawn(index, batches, sampler)
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
                            judged = _judge_on_dev(arm, materials)
                    except Exception as error:  # one arm's failure is its own; KeyboardInterrupt passes
                        failures[title] = str(error) if isinstance(error, TrainingFailure) else described(error)
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
            load_state(arm.model, arm.best_state, "the best checkpoint")
    return failures


def dev_score(pooled: dict[str, dict[str, float]]) -> float:
    """What checkpoints and settings are chosen by on dev, lower is better: spk_vc + spk_id by the judge.

    Conversion alone would prefer a model that forgets what the source said; both ends of the gap count.
    """
    return pooled["spk_vc"]["mean"] + pooled["spk_id"]["mean"]


def _judge_on_dev(arm: Arm, materials: Materials) -> dict[str, float]:
    """Judge conversions of dev speakers, keep the best state, and stop where patience runs out; what to log of it."""
    study, progress = materials.study, arm.progress
    metrics = {name: materials.catalogue.metrics[name]() for name in DEV_METRICS}
    pooled = score(conditioned(arm.model, synthetic=False), materials.dev, materials.catalogue, only=metrics).pooled
    found = dev_score(pooled)
    judge = materials.judge.name
    measured = {f"judge/{judge}/{name}": values["mean"] for name, values in pooled.items() if name != "teacher_secs"}
    measured[f"teacher/{materials.teacher.name}/secs"] = pooled["teacher_secs"]["mean"]
    if found < progress.best:
        progress.best, progress.best_step, progress.stale = found, progress.step, 0
        if study.select == "best":
            arm.best_state = {key: value.clone() for key, value in state_of(arm.model).items()}
    else:
        progress.stale += 1
    if progress.step == study.steps or (study.patience and progress.stale >= study.patience):
        progress.finished = True
    return {**measured, "score": found}
