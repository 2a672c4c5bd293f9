"""One training step of arms side by side: losses, gradients, and updates.

A batch may be computed in parts: on several devices, and one after the other to save memory (`accumulate`). Every loss
term is a mean over items, so the gradient of the batch is the sum of the parts' gradients, weighted by their shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import REFERENCE
from snac_core.losses import cosine_distance
from snac_core.plugin_guard import describe_error
from snac_core.seeding import derive
from snac_core.step import Step
from snac_runner.arm import Arm
from snac_runner.config import StudySettings
from snac_runner.distributed import DistributedContext, ProcessLost
from snac_runner.memory import PeakMemory, gibibytes, is_out_of_memory
from snac_runner.resources import TrainingBatch

SYNTHETIC = "spk_synth"  # a term of this name is also logged without its strategy's name, as spk_id and spk_vc are
_DISTANCES = 10, 100  # if no loss decodes audio: least steps between speaker distances, and most of them in a run


class TrainingFailure(RuntimeError):
    """An arm cannot continue; the message says at which step and why. The other arms are not affected."""


class Outcome(NamedTuple):
    """What a step of several arms gave.

    Attributes:
        logged: arm title to what to log, for the arms that were updated.
        failures: arm title to the reason, for the others.
        stop: whether a process was asked to stop.
    """

    logged: dict[str, dict[str, float]]
    failures: dict[str, str]
    stop: bool

    def checked(self) -> dict[str, dict[str, float]]:
        """`logged`; raises TrainingFailure if an arm failed."""
        for title, reason in self.failures.items():
            raise TrainingFailure(f"{title}: {reason}")
        return self.logged


def train_step(
    arms: Sequence[Arm], batch: Iterable[TrainingBatch], context: DistributedContext, *, stop: bool = False
) -> Outcome:
    """Train arms on one batch.

    Nothing waits for the device before the values to log are read, after all arms have been updated.

    Args:
        arms: of one seed.
        batch: the parts of the batch that this process computes.
        context: this process among all that compute parts.
        stop: whether this process was asked to stop; then all processes stop after this step.
    """
    steps = [ArmStep(arm, context) for arm in arms]
    for part in batch:
        for step in steps:
            step.add(part)
    stop, failures = _agree(steps, stop, context)
    steps = [step for step in steps if step.arm.settings.title not in failures]
    if context.world > 1 and steps:
        together = torch.cat([step.travelling() for step in steps])
        context.add_up(together)
        for step, summed in zip(steps, torch.split(together, [step.travelling_size for step in steps]), strict=True):
            step.arrived(summed)
    for step in list(steps):
        try:
            step.update()
        except Exception as error:  # fails this arm alone
            if context.world > 1:  # the other processes cannot know
                raise
            failures[step.arm.settings.title] = failure_of(error)
            steps.remove(step)
    logged = {}
    values = torch.cat([step.to_log() for step in steps]).tolist() if steps else []  # waits for the device
    for step in steps:
        own, values = values[: len(step.names)], values[len(step.names) :]
        named = dict(zip(step.names, own, strict=True))
        title = step.arm.settings.title
        try:
            logged[title] = step.checked(named)
        except TrainingFailure as failure:
            failures[title] = str(failure)
            step.arm.progress.step -= 1  # the last sound step
    return Outcome(logged, failures, stop)


class ArmStep:
    """One step of one arm: the gradient of the batch from its parts, and the updates.

    Args:
        arm: what is trained.
        context: this process among all that compute parts of the batch.
    """

    def __init__(self, arm: Arm, context: DistributedContext) -> None:
        self.arm, self.context = arm, context
        self.index = arm.progress.step + 1
        self.failure: str | None = None
        self.groups = [arm.optimizer.param_groups[0]["params"]]
        if arm.discriminator_optimizer is not None:
            self.groups.append(arm.discriminator_optimizer.param_groups[0]["params"])
        self.parameters: list[Tensor] = [parameter for group in self.groups for parameter in group]
        self.bounds = [0]
        for parameter in self.parameters:
            self.bounds.append(self.bounds[-1] + parameter.numel())
        self.gradient = torch.zeros(self.bounds[-1], device=arm.resources.device)  # flat, of all parameters
        self.used = torch.zeros(len(self.parameters))  # above 0: the parameter has a gradient; on the CPU
        self.sums: dict[str, Tensor] = {}  # of what is logged, weighted by the parts' shares
        self.own: Tensor | None = None  # the sums of this process alone
        self.norms: list[Tensor] = []  # of the gradient of each group

    # ---------------------------------------------------------------- gradients of one part

    def add(self, part: TrainingBatch) -> None:
        """Add a part's share of the gradient, and of what is logged; an error is kept in `failure`."""
        if self.failure is not None:
            return
        memory = PeakMemory(self.arm.resources.device)
        try:
            with self.arm.stopwatch, memory:
                self._add(part)
        except ProcessLost:
            raise
        except Exception as error:  # fails this arm alone; a KeyboardInterrupt is not an Exception
            study = self.arm.resources.study
            self.failure = out_of_memory(error, study, self.index, memory.peak) or failure_of(error)
        self.arm.progress.peak_memory = max(self.arm.progress.peak_memory, memory.peak)

    def _add(self, part: TrainingBatch) -> None:
        arm, index, study = self.arm, part.index, self.arm.resources.study
        self.index = index
        place = (part.rows.start,) if part.rows.start else ()
        torch.manual_seed(derive(arm.seed, index, "arm", *place))  # dropout and other random numbers of the strategies
        codec = arm.model.codec
        with codec.fixed_noise(derive(arm.seed, index, "noise")), computing(arm.model, study):
            step = make_step(arm, part)
            terms = loss_terms(step, "loss")
            every = max(_DISTANCES[0], study.steps // _DISTANCES[1])
            distances = speaker_distances(step) if step.decoded or index % every == 1 else {}
            loss = weighted_sum(arm, terms)
            self._add_gradient(0, loss, part.share)
            to_log = {"loss": loss, **terms}
            if arm.discriminator_optimizer is not None:
                terms = loss_terms(step, "discriminator_loss")
                loss = weighted_sum(arm, terms)
                self._add_gradient(1, loss, part.share)
                to_log |= {"discriminator_loss": loss, **terms}
        for name, value in (to_log | distances).items():
            value = value.detach().to(self.gradient) * part.share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_gradient(self, group: int, loss: Tensor, share: float) -> None:
        if not loss.requires_grad:
            return
        first = group * len(self.groups[0])
        found = torch.autograd.grad(loss, self.groups[group], allow_unused=True)
        for number, gradient in enumerate(found, first):
            if gradient is not None:
                place = self.gradient[self.bounds[number] : self.bounds[number + 1]]
                place.add_(gradient.reshape(-1), alpha=share)
                self.used[number] = 1

    # ---------------------------------------------------------------- sums over the processes

    def travelling(self) -> Tensor:
        """The gradient and the sums to log, flat."""
        self.own = torch.stack(list(self.sums.values()))
        return torch.cat([self.gradient, self.own])

    @property
    def travelling_size(self) -> int:
        """Number of values of `travelling`."""
        return len(self.gradient) + len(self.sums)

    def arrived(self, summed: Tensor) -> None:
        """Take over the sum over all processes of `travelling`."""
        self.gradient = summed[: len(self.gradient)]
        self.sums = dict(zip(self.sums, summed[len(self.gradient) :].unbind(), strict=True))

    # ---------------------------------------------------------------- updates

    def update(self) -> None:
        """Gradient clipping and one step of each optimizer; a checkpoint from here on is one after this step."""
        arm, settings = self.arm, self.arm.settings
        with arm.stopwatch:
            for number, (start, end) in enumerate(pairwise(self.bounds)):
                parameter = self.parameters[number]
                used = bool(self.used[number])
                gradient = self.gradient[start:end].view_as(parameter).to(parameter.dtype)
                parameter.grad = gradient if used else None
            self._update(0, arm.optimizer, settings.lr, settings.grad_clip)
            if arm.discriminator_optimizer is not None:
                self._update(
                    1, arm.discriminator_optimizer, settings.discriminator_lr, settings.discriminator_grad_clip
                )
        arm.progress.step = self.index

    def _update(self, group: int, optimizer: torch.optim.Optimizer, peak: float, max_norm: float) -> None:
        self.norms.append(torch.nn.utils.clip_grad_norm_(self.groups[group], max_norm))
        for options in optimizer.param_groups:
            options["lr"] = self.arm.learning_rate(peak, self.index)
        optimizer.step()

    # ---------------------------------------------------------------- what is logged

    @property
    def names(self) -> list[str]:
        """Names of the values of `to_log`."""
        return [*self.sums, *(f"norm {group}" for group in range(len(self.norms)))]

    def to_log(self) -> Tensor:
        """The sums, and the norm of the gradient of each group, in one tensor."""
        return torch.stack([*self.sums.values(), *(norm.to(self.gradient) for norm in self.norms)])

    def checked(self, values: Mapping[str, float]) -> dict[str, float]:
        """What to log, from the values by name.

        Raises:
            TrainingFailure: if a loss or a gradient is not finite.
        """
        finite = {name: abs(value) < float("inf") for name, value in values.items()}
        for loss in ("loss", "discriminator_loss"):
            if not finite.get(loss, True):
                of_terms = [name for name, ok in finite.items() if not ok and "/" in name and self.arm.weight(name)]
                where = of_terms[0] if of_terms else "the sum"
                raise TrainingFailure(f"NaN or infinite loss at step {self.index}, in {where}{self._only_on()}")
        if not all(finite[f"norm {group}"] for group in range(len(self.norms))):
            raise TrainingFailure(f"NaN or infinite gradient at step {self.index}{self._only_on()}")
        settings = self.arm.settings
        logged = {name: value for name, value in values.items() if name in self.sums and name != "discriminator_loss"}
        synthetic = {SYNTHETIC: value for name, value in logged.items() if name.endswith(f"/{SYNTHETIC}")}  # noqa: B035
        return {"lr": self.arm.learning_rate(settings.lr, self.index), **logged, **synthetic}

    def _only_on(self) -> str:
        """Of several processes, those on which a value is not finite, as a part of a sentence."""
        if self.context.world == 1 or self.own is None:
            return ""
        sound = self.context.gather(bool(self.own.isfinite().all()))
        bad = [str(rank) for rank, ok in enumerate(sound) if not ok]
        return f", on process {', '.join(bad)} of {self.context.world}" if 0 < len(bad) < len(sound) else ""


def _agree(steps: Sequence[ArmStep], stop: bool, context: DistributedContext) -> tuple[bool, dict[str, str]]:
    """Whether any process was asked to stop; the arms that failed on any process, with the reason.

    Also makes `used` the same on all processes. The exchanged flags are on the CPU: reading them does not wait for a
    device.
    """
    if context.world == 1:
        return stop, {step.arm.settings.title: step.failure for step in steps if step.failure is not None}
    failed = [step.failure is not None for step in steps]
    flags = torch.cat([torch.tensor([stop, *failed], dtype=torch.float32), *(step.used for step in steps)])
    context.add_up(flags)
    start = 1 + len(steps)
    for step in steps:
        step.used = flags[start : start + len(step.used)]
        start += len(step.used)
    failures = {}
    for step, count in zip(steps, flags[1 : 1 + len(steps)].tolist(), strict=True):
        if count:
            reasons = context.gather(step.failure)
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
            where = f", on process {rank} of {context.world}" if count < context.world else ""
            failures[step.arm.settings.title] = f"{reason}{where}"
    return bool(flags[0]), failures


def make_step(arm: Arm, batch: TrainingBatch, model: ConditionedCodec | None = None) -> Step:
    """What the losses see: of the arm's model, or of a copy of it. Its fields are computed on first use."""
    model = model or arm.model
    attends = REFERENCE in model.extras
    step = Step(
        model,
        batch.frozen.audio,
        sample_rate=arm.resources.codec.sampling_rate,
        speaker_ids=batch.speakers,
        target_ids=batch.targets,
        speaker_encoder=arm.resources.speaker_encoder,
        sampler=arm.sampler,
        index=batch.index,
        rows=batch.rows,
        frozen_activations=batch.frozen,
        imitations=batch.imitations,
        own_speech=batch.own_speech if attends else None,
        target_speech=batch.target_speech if attends else None,
        batch_audio=lambda: arm.resources.audio(arm.seed, batch.index),
        parallel=lambda: arm.resources.parallel(arm.seed, batch.index, step.target_ids, batch.rows),
    )
    return step


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


@torch.no_grad()
def speaker_distances(step: Step) -> dict[str, Tensor]:
    """Mean cosine distances of the outputs to their speakers, by the conditioning encoder: the training curves."""
    spk_id = cosine_distance(step.identity_embedding, step.own_reference).mean()
    spk_vc = cosine_distance(step.converted_embedding, step.target_reference).mean()
    return {"spk_id": spk_id, "spk_vc": spk_vc, "gap": spk_vc - spk_id}


def failure_of(error: Exception) -> str:
    """Why an arm failed, in one line."""
    return str(error) if isinstance(error, TrainingFailure) else describe_error(error)


def out_of_memory(error: BaseException, study: StudySettings, index: int, peak: int) -> str | None:
    """What to lower, if the memory of the device was not enough; None for another error."""
    if not is_out_of_memory(error):
        return None
    torch.cuda.empty_cache()  # for the other arms
    remedies = [f"accumulate = {2 * study.accumulate}"] if 2 * study.accumulate <= study.batch_size else []
    remedies += [] if study.checkpoint_decoder else ["checkpoint_decoder = true"]
    remedies += [] if study.precision == "bf16" else ["precision = 'bf16'"]
    return (
        f"out of memory at step {index} (peak {gibibytes(peak)}): set {', or '.join(remedies)}, or lower batch_size "
        f"(now {study.batch_size}) or crop_seconds (now {study.crop_seconds:g})"
    )


@contextmanager
def computing(model: ConditionedCodec, study: StudySettings) -> Iterator[None]:
    """Inside the block, the codec and its edits compute as the study says: precision, activation checkpointing."""
    dtype = torch.bfloat16 if study.precision == "bf16" else None
    of_codec = model.codec.computing(autocast=dtype, checkpoint_decoder=study.checkpoint_decoder)
    with precision_of_torch(study.precision), of_codec:
        yield


@contextmanager
def precision_of_torch(precision: str) -> Iterator[None]:
    """Inside the block, CUDA rounds float32 products to TF32, except with "fp32"; no effect on the CPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _shape(found: Any) -> str:
    if not isinstance(found, dict):
        return "None" if found is None else type(found).__name__
    return str({k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in found.items()})
