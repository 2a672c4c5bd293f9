"""Training: the loop over the steps, one step of one arm, and the evaluation on dev speakers.

The arms of one seed train side by side: each step draws one batch, computes the frozen codec's activations of it once,
and every arm takes its own step on them. An arm's result does not depend on the other arms: batches and targets are a
function of (seed, step), so are each arm's own random numbers, and what the arms share is frozen.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snac_core.checkpoint import load_state, state_of
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.frozen import FrozenActivations
from snac_core.losses import cosine_distance
from snac_core.plugin_guard import describe_error
from snac_core.seeding import derive
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.step import Step
from snac_core.testing import preflight as check_rules
from snac_runner.arm import Arm
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.systems import conditioned
from snac_runner.logs import RunLog
from snac_runner.resources import StudyResources, TrainingBatch

DEV_METRICS = ("secs", "spk_id", "spk_vc", "gap", "specificity", "speaker_encoder_secs")
SYNTHETIC = "spk_synth"  # a term of this name is also logged without its strategy's name, as spk_id and spk_vc are
_DISTANCES_EVERY = 10  # steps between measurements of the speaker distances if no loss decodes audio
_PREFLIGHT_ITEMS = 3


class TrainingFailure(RuntimeError):
    """An arm cannot continue; the message says at which step and why. The other arms are not affected."""


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
    study, seed = resources.study, arms[0].seed
    batches, sampler = resources.batches(seed), SpeakerSampler(resources.table, seed)
    logs = {arm.settings.title: RunLog(arm.folder, batches.steps_per_epoch, arm.progress.step) for arm in arms}
    progress = resources.console.progress(f"seed {seed}: training {len(arms)} arm(s) side by side")
    failures: dict[str, str] = {}
    active = [arm for arm in arms if not arm.progress.finished]
    first = 1 + min((arm.progress.step for arm in active), default=study.steps)
    try:
        with stoppable() as interrupted:
            for index in range(first, study.steps + 1):
                batch = resources.draw(index, batches, sampler)
                training = [arm for arm in active if arm.progress.step < index]
                logged: dict[str, dict[str, float]] = {}
                for arm in training:
                    title, log = arm.settings.title, logs[arm.settings.title]
                    scores = None
                    try:
                        started, shared = arm.clock(), batch.shared_seconds
                        logged[title] = train_step(arm, batch)
                        arm.progress.seconds_own += arm.clock() - started - (batch.shared_seconds - shared)
                        if (study.eval_every and index % study.eval_every == 0) or index == study.steps:
                            scores = evaluate_on_dev(arm)
                    except Exception as error:  # fails this arm alone; a KeyboardInterrupt is not an Exception
                        failures[title] = str(error) if isinstance(error, TrainingFailure) else describe_error(error)
                        active.remove(arm)
                    if title in logged:  # outside of `try`: a full disk is not a failure of the arm
                        log.write({"step": index, "seconds": arm.progress.seconds_own, **logged[title]})
                    if scores is not None:
                        log.write({"step": index, "dev": scores})
                stopping = interrupted.is_set()  # read once, so that no arm stops without having saved
                for arm in training:
                    arm.progress.seconds_shared += batch.shared_seconds
                    if arm in active and (index % study.save_every == 0 or arm.progress.finished or stopping):
                        logs[arm.settings.title].flush()
                        arm.save()
                progress(index, study.steps, _note(logged))
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


# -------------------------------------------------------------------------------- one step of one arm


def train_step(arm: Arm, batch: TrainingBatch) -> dict[str, float]:
    """Train an arm on one batch; returns what to log.

    Raises:
        TrainingFailure: if a loss or a gradient is not finite, or a hook does not return scalar terms.
    """
    settings, index = arm.settings, batch.index
    torch.manual_seed(derive(arm.seed, index, "arm"))  # dropout and other random numbers of the strategies
    with arm.model.codec.fixed_noise(derive(arm.seed, index, "noise")):
        step = make_step(arm, batch)
        terms = loss_terms(step, "loss")
        distances = speaker_distances(step) if step.decoded or index % _DISTANCES_EVERY == 1 else {}
        loss = weighted_sum(arm, terms)
        _check_finite(loss, terms, index)
        lr = arm.learning_rate(settings.lr, index)
        update(arm.optimizer, loss, lr, settings.grad_clip, index)

        if arm.discriminator_optimizer is not None:
            arm.discriminator_optimizer.zero_grad(set_to_none=True)  # gradients of the arm's own loss
            discriminator_terms = loss_terms(step, "discriminator_loss")
            discriminator_loss = weighted_sum(arm, discriminator_terms)
            _check_finite(discriminator_loss, discriminator_terms, index)
            discriminator_lr = arm.learning_rate(settings.discriminator_lr, index)
            update(
                arm.discriminator_optimizer, discriminator_loss, discriminator_lr,
                settings.discriminator_grad_clip, index,
            )  # fmt: skip
            terms |= discriminator_terms
    arm.progress.step = index
    logged = {name: float(value.detach()) for name, value in terms.items()}
    synthetic = {SYNTHETIC: value for name, value in logged.items() if name.endswith(f"/{SYNTHETIC}")}  # noqa: B035
    return {"lr": lr, "loss": float(loss.detach()), **logged, **distances, **synthetic}


def make_step(arm: Arm, batch: TrainingBatch, model: ConditionedCodec | None = None) -> Step:
    """What the losses see: of the arm's model, or of a copy of it. Its fields are computed on first use."""
    return Step(
        model or arm.model,
        batch.frozen.audio,
        sample_rate=arm.resources.codec.sampling_rate,
        speaker_ids=batch.speakers,
        target_ids=batch.targets,
        speaker_encoder=arm.resources.speaker_encoder,
        sampler=arm.sampler,
        index=batch.index,
        frozen_activations=batch.frozen,
        parallel=partial(arm.resources.parallel, arm.seed, batch.index, batch.targets, len(batch.speakers)),
    )


def loss_terms(step: Step, hook: str) -> dict[str, Tensor]:
    """All raw terms of a hook of the step's model, as `<strategy>/<term>` to a scalar.

    Raises:
        TrainingFailure: if a hook returns something else than a dict of scalar tensors.
    """
    terms: dict[str, Tensor] = {}
    for name, implementation in step.model.callers(hook):
        found = implementation(step=step)
        if not isinstance(found, dict) or not all(
            isinstance(value, Tensor) and value.numel() == 1 for value in found.values()
        ):
            raise TrainingFailure(f"{hook} of {name!r} must return a dict of scalar tensors; got {_shape(found)}")
        terms.update({f"{name}/{term}": value.reshape(()) for term, value in found.items()})
    return terms


def weighted_sum(arm: Arm, terms: Mapping[str, Tensor]) -> Tensor:
    """The one place where terms are weighted: by the study, else by the strategy's default, else by 1.

    A term of weight 0 is left out, whatever its value.
    """
    weights = {name: arm.weight(name) for name in terms}
    weighted = [weight * terms[name] for name, weight in weights.items() if weight]
    return torch.stack(weighted).sum() if weighted else torch.zeros(())


def update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, max_norm: float, index: int) -> None:
    """Backward pass, gradient clipping and one step of an optimizer.

    Raises:
        TrainingFailure: if the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not norm.isfinite():
        raise TrainingFailure(f"NaN or infinite gradient at step {index}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


@torch.no_grad()
def speaker_distances(step: Step) -> dict[str, float]:
    """Mean cosine distances of the outputs to their speakers, by the conditioning encoder: the training curves."""
    spk_id = float(cosine_distance(step.identity_embedding, step.own_reference).mean())
    spk_vc = float(cosine_distance(step.converted_embedding, step.target_reference).mean())
    return {"spk_id": spk_id, "spk_vc": spk_vc, "gap": spk_vc - spk_id}


def _check_finite(loss: Tensor, terms: Mapping[str, Tensor], index: int) -> None:
    if not loss.isfinite():
        bad = next((name for name, value in terms.items() if not value.isfinite()), "the sum")
        raise TrainingFailure(f"NaN or infinite loss at step {index}, in {bad}")


def _shape(found: Any) -> str:
    if not isinstance(found, dict):
        return "None" if found is None else type(found).__name__
    return str({k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in found.items()})


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
    crops = resources.batches(arm.seed).at(0)
    items = min(_PREFLIGHT_ITEMS, len(crops.speakers))
    audio = crops.audio[:items].to(resources.device)
    speakers = resources.table.indices(crops.speakers[:items])
    targets = arm.sampler.targets(speakers, 0, 1)
    cond = Conditioning(resources.table.conditioning[targets].to(resources.device), encoder=resources.table.encoder)

    def loss(model: ConditionedCodec) -> Tensor:
        batch = TrainingBatch(0, FrozenActivations(resources.codec, audio), speakers, targets)
        step = make_step(arm, batch, model)
        terms = loss_terms(step, "loss")
        arm.check_weights({*terms, *loss_terms(step, "discriminator_loss")})
        return weighted_sum(arm, terms)

    check_rules(arm.model, loss, audio, cond, seed=arm.seed)


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
    pooled = score(conditioned(arm.model, synthetic=False), resources.dev, metrics).pooled
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
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that the current step ends; the second interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(_number: int, _frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
