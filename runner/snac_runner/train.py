"""Training: the loop over the steps, and the evaluation on dev speakers.

The arms of one seed train side by side: each step draws one batch, computes the frozen codec's activations of it once,
and every arm takes its own step on them. An arm's result does not depend on the other arms: batches and targets are a
function of (seed, step), so are each arm's own random numbers, and what the arms share is frozen.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from snac_core.checkpoint import load_state, state_of
from snac_core.conditioned import ConditionedCodec
from snac_core.frozen import FrozenActivations
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.testing import preflight as check_rules
from snac_runner.arm import Arm
from snac_runner.console import Console
from snac_runner.distributed import ProcessLost
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.systems import conditioned, evaluating, needed_outputs
from snac_runner.logs import RunLog
from snac_runner.resources import StudyResources
from snac_runner.train_step import failure_of, loss_terms, make_step, train_step, weighted_sum

DEV_METRICS = ("secs", "spk_id", "spk_vc", "gap", "specificity", "speaker_encoder_secs")
_PREFLIGHT_ITEMS = 3


class Interrupted(KeyboardInterrupt):
    """Training was stopped between two steps, after every arm has saved its checkpoint."""


def train_side_by_side(arms: Sequence[Arm], resources: StudyResources) -> dict[str, str]:
    """Train arms of one seed to their end, from their checkpoints on.

    Args:
        arms: of one seed; an arm with more steps done than the others waits for them.
        resources: what the arms share.

    Returns:
        arm title to the reason, for each arm that failed; the others are finished.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after all checkpoints are written.
    """
    study, seed, context = resources.study, arms[0].seed, resources.context
    active = [arm for arm in arms if not arm.progress.finished]
    batches = resources.batches_ahead(seed)
    sampler = SpeakerSampler(resources.table, seed, lambda: resources.utterances)
    logs = {
        arm.settings.title: RunLog(arm.folder, batches.steps_per_epoch, arm.progress.step)
        for arm in (active if context.first else ())
    }
    others = f" and {len(arms) - 1} more" if len(arms) > 1 else ""
    progress = resources.console.progress(f"seed {seed}: training {arms[0].settings.title}{others}")
    failures: dict[str, str] = {}

    def save(arm: Arm) -> None:
        if log := logs.get(arm.settings.title):
            log.flush()
        arm.save()

    def evaluate(arm: Arm) -> None:
        """The dev evaluation of the arm's step, into its log."""
        title = arm.settings.title
        try:
            scores = evaluate_on_dev(arm)
        except ProcessLost:
            raise
        except Exception as error:  # fails this arm alone; a KeyboardInterrupt is not an Exception
            failures[title] = failure_of(error)
            return
        arm.progress.pending = False
        if scores is not None and (log := logs.get(title)):  # not in `try`: a full disk is not a failure of the arm
            log.write({"step": arm.progress.step, "dev": scores})

    try:
        with stoppable(resources.console) as interrupted:
            for arm in [arm for arm in active if arm.progress.pending]:
                evaluate(arm)
                if arm.settings.title not in failures:
                    save(arm)
            active = [arm for arm in active if arm.settings.title not in failures and not arm.progress.finished]
            first = 1 + min((arm.progress.step for arm in active), default=study.steps)
            for index in range(first, study.steps + 1):
                due = (study.eval_every > 0 and index % study.eval_every == 0) or index == study.steps
                training = [arm for arm in active if arm.progress.step < index]
                batch = (resources.draw(index, batches, sampler, rows) for rows in resources.parts)
                outcome = train_step(training, batch, context, stop=interrupted.is_set())
                failures |= outcome.failures
                for run_log in logs.values() if index == first and resources.drawn_from else ():
                    run_log.remark(resources.drawn_from)
                shared = resources.shared_time.lap()
                for arm in training:
                    title = arm.settings.title
                    arm.progress.seconds_own += arm.stopwatch.lap()
                    arm.progress.seconds_shared += shared
                    arm.progress.pending = due and title in outcome.logged
                    if title in outcome.logged and (log := logs.get(title)):
                        log.write({"step": index, "seconds": arm.progress.seconds_own, **outcome.logged[title]})
                for arm in training:
                    if arm.progress.pending:
                        evaluate(arm)
                    if arm.settings.title in failures:
                        active.remove(arm)
                for arm in training:
                    if arm in active and (index % study.save_every == 0 or arm.progress.finished or outcome.stop):
                        save(arm)
                progress(index, study.steps, _note(outcome.logged))
                active = [arm for arm in active if not arm.progress.finished]
                if outcome.stop:
                    raise Interrupted(f"stopped after step {index} of {study.steps}")
                if not active:
                    break
    except ProcessLost as lost:
        for arm in active:
            save(arm)
        raise Interrupted(f"{lost}; stopped after step {min(arm.progress.step for arm in active)}") from lost
    finally:
        batches.close()
        for log in logs.values():
            log.close()
    for arm in arms:
        if study.select == "best" and arm.best_state:
            load_state(arm.model.attached, arm.best_state, "the best checkpoint")
    return failures


def _note(logged: Mapping[str, Mapping[str, float]]) -> str:
    """What the progress bar shows of a step."""
    return "  ".join(
        f"{title}: gap {values['gap']:.3f}" if "gap" in values else f"{title}: loss {values['loss']:.3f}"
        for title, values in logged.items()
    )


# -------------------------------------------------------------------------------- before and during training


def preflight(arm: Arm) -> None:
    """Refuse an arm with a strategy that gets no gradient, ignores its embedding, mixes the batch, or changes shapes.

    The check runs on the real codec and a real batch, and does not change the arm.

    Raises:
        UserError: naming the strategy and what to change; or a weight for a term that no strategy computes.
    """
    resources = arm.resources
    rows = slice(0, _PREFLIGHT_ITEMS)
    crops = resources.batches(arm.seed).at(0, rows)
    audio = crops.audio.to(resources.device)
    speakers = resources.table.indices(crops.speakers)
    targets = arm.sampler.targets(speakers, 0, 1)
    batch = resources.batch_of(0, crops, FrozenActivations(resources.codec, audio), speakers, targets, rows)
    cond = make_step(arm, batch).target

    def loss(model: ConditionedCodec) -> Tensor:
        step = make_step(arm, replace(batch, frozen=FrozenActivations(resources.codec, audio)), model)
        terms = loss_terms(step, "loss")
        arm.check_weights({*terms, *loss_terms(step, "discriminator_loss")})
        return weighted_sum(arm, terms)

    with torch.compiler.set_stance("force_eager"):  # the rules take several gradients of one graph
        check_rules(arm.model, loss, audio, cond, seed=arm.seed, frozen=arm.settings.frozen)


def evaluate_on_dev(arm: Arm) -> dict[str, float] | None:
    """Score conversions of dev speakers, keep the best state, and end the training if patience runs out.

    Returns:
        what to log; None if the study has no dev conversions.
    """
    resources, progress = arm.resources, arm.progress
    study = resources.study
    if not len(resources.dev_pairs):
        progress.finished = progress.step == study.steps
        return None
    metrics = {name: resources.catalogue.metrics[name]() for name in DEV_METRICS}
    with evaluating(arm.model):
        system = conditioned(arm.model, outputs=needed_outputs(metrics.values()))
        pooled = score(system, resources.dev, metrics, context=resources.context).pooled
    found = dev_score(pooled)
    judge = resources.judge.name
    logged = {
        f"judge/{judge}/{name}": values["mean"] for name, values in pooled.items() if name != "speaker_encoder_secs"
    }
    logged[f"speaker_encoder/{resources.speaker_encoder.name}/secs"] = pooled["speaker_encoder_secs"]["mean"]
    if found < progress.best:
        progress.best, progress.best_step, progress.stale = found, progress.step, 0
        if study.select == "best":
            arm.best_state = {key: value.clone() for key, value in state_of(arm.model.attached).items()}
    else:
        progress.stale += 1
    if progress.step == study.steps or (study.patience and progress.stale >= study.patience):
        progress.finished = True
    return {**logged, "score": found}


def dev_score(pooled: dict[str, dict[str, float]]) -> float:
    """What selects checkpoints and learning rates, lower is better: spk_vc + spk_id by the judge, on dev speakers.

    The conversion term alone would prefer a model that loses the source's content, so the identity term counts too.
    """
    return pooled["spk_vc"]["mean"] + pooled["spk_id"]["mean"]


@contextmanager
def stoppable(console: Console) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that the current step ends; the second interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(_number: int, _frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        console.line("stopping after this step, which is saved; Ctrl-C again stops at once, at the last checkpoint")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) is on_signal:
                signal.signal(number, previous)
